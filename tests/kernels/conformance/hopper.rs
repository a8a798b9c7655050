//! `kernels/conformance_hopper.cu`.

use super::*;
use respodiff::cuda::TensorTiles;

#[test]
pub fn stmatrix() {
    let input = noise(128, 11);
    for (kernel, trans) in [("conformance_stmatrix_x4", false), ("conformance_stmatrix_x4_trans", true)] {
        let mut halves = [0u32; 256];
        for (i, register) in input.iter().enumerate() {
            let (matrix, (g, t)) = (i % 4, group(i / 4));
            for k in 0..2 {
                let (row, column) = if trans { (2 * t + k, g) } else { (g, 2 * t + k) };
                halves[shuffled(8 * matrix + row) * 8 + column] = register >> (16 * k) & 0xffff;
            }
        }
        let expected: Vec<u32> = halves.chunks_exact(2).map(|h| h[0] | h[1] << 16).collect();
        exactly(kernel, true, 32, 512, &input, &expected);
    }
}

#[test]
pub fn mbarriers() {
    let input = noise(192, 12);
    let expected: Vec<u32> = input.chunks_exact(64).flat_map(|round| round.iter().rev().copied()).collect();
    exactly("conformance_mbarriers", true, 96, 256 + 16, &input, &expected);
}

#[test]
pub fn setmaxnreg() {
    let input = noise(384, 13);
    let expected = (0..384).map(|i| input[i].wrapping_add(if i < 128 { 1 } else { 2 }));
    exactly("conformance_setmaxnreg", true, 384, 0, &input, &expected.collect::<Vec<_>>());
}

respodiff::params! {
    pub struct TmaParams {
        map: [u64; 16],
        tile: u64,
        words: u32,
        x: [i32; 4],
        padding: [i32; 25],
    }
}

/// The offset in a swizzled tile of the byte that is at `offset` of a tile without a swizzle: 16-byte chunks are
/// permuted within a span of 16 << `swizzle` bytes, by the number of the 128-byte line.
fn swizzled(offset: usize, swizzle: u32) -> usize {
    let line = offset / 128;
    offset ^ ((line % (1 << swizzle)) * 16)
}

/// A tensor of halves, a tile of it, and the tile's origin, innermost dimension first.
struct Tiling<'a> {
    sizes: &'a [usize],
    tile: &'a [usize],
    x: &'a [i32],
    swizzle: u32,
}

impl Tiling<'_> {
    fn name(&self) -> String {
        format!("{}d_swizzle{}", self.sizes.len(), [0, 32, 64, 128][self.swizzle as usize])
    }

    /// For each half of the tile: its index in shared memory, and its index in the tensor if it is inside.
    fn places(&self) -> Vec<(usize, Option<usize>)> {
        let place = |i: usize| {
            let (mut rest, mut stride, mut at) = (i, 1, Some(0));
            for ((&size, &tile), &x) in self.sizes.iter().zip(self.tile).zip(self.x) {
                let coordinate = x as isize + (rest % tile) as isize;
                let inside = (0..size as isize).contains(&coordinate);
                at = at.filter(|_| inside).map(|at| at + coordinate as usize * stride);
                rest /= tile;
                stride *= size;
            }
            (swizzled(i * 2, self.swizzle) / 2, at)
        };
        (0..self.tile.iter().product()).map(place).collect()
    }

    fn prepare(&self, kernel: &'static str, device: &Arc<dyn CudaDevice>, tensor: u64, tile: u64) -> Launch {
        let mut stride = 2;
        let mut strides = Vec::new();
        for &size in &self.sizes[..self.sizes.len() - 1] {
            stride *= size as u64;
            strides.push(stride);
        }
        let sizes: Vec<u64> = self.sizes.iter().map(|&n| n as u64).collect();
        let shape: Vec<u32> = self.tile.iter().map(|&n| n as u32).collect();
        let tiles =
            TensorTiles { address: tensor, sizes: &sizes, strides: &strides, tile: &shape, swizzle: self.swizzle };
        let words = self.tile.iter().product::<usize>() / 2;
        let mut x = [0; 4];
        x[..self.x.len()].copy_from_slice(self.x);
        let map = device.tensor_map(&tiles).unwrap();
        let params = TmaParams { map, tile, words: words as u32, x, padding: [0; 25] };
        Launch::new(kernel, [1, 1, 1], 32, words * 4 + 8, &params)
    }

    fn load(&self, kernel: &'static str) {
        let tensor = noise(self.sizes.iter().product::<usize>() / 2, 14);
        let half = |i: usize| tensor[i / 2] >> (i % 2 * 16) & 0xffff;
        let mut halves = vec![0; self.tile.iter().product()];
        for (place, at) in self.places() {
            halves[place] = at.map_or(0, half);
        }
        let expected: Vec<u32> = halves.chunks_exact(2).map(|h| h[0] | h[1] << 16).collect();
        let case = format!("tma_load_{}", self.name());
        let outputs = outputs(&case, true, &vec![!0; expected.len()], |device, tile| {
            let memory = Buffer::from_bytes(device, bytemuck::cast_slice(&tensor)).unwrap();
            (vec![self.prepare(kernel, device, memory.address(), tile)], vec![memory])
        });
        same(&outputs, &expected);
    }

    fn store(&self, kernel: &'static str) {
        let tile = noise(self.tile.iter().product::<usize>() / 2, 15);
        let before = noise(self.sizes.iter().product::<usize>() / 2, 16);
        let mut halves: Vec<u32> = before.iter().flat_map(|word| [word & 0xffff, word >> 16]).collect();
        for (place, at) in self.places() {
            if let Some(at) = at {
                halves[at] = tile[place / 2] >> (place % 2 * 16) & 0xffff;
            }
        }
        let expected: Vec<u32> = halves.chunks_exact(2).map(|h| h[0] | h[1] << 16).collect();
        let case = format!("tma_store_{}", self.name());
        let outputs = outputs(&case, true, &before, |device, tensor| {
            let memory = Buffer::from_bytes(device, bytemuck::cast_slice(&tile)).unwrap();
            (vec![self.prepare(kernel, device, tensor, memory.address())], vec![memory])
        });
        same(&outputs, &expected);
    }
}

#[test]
pub fn tma() {
    for swizzle in 0..4 {
        // A tile over the far corner, one span wide. A store that begins at a negative coordinate is an illegal
        // instruction.
        let tile = [[24, 16, 32, 64][swizzle as usize], 16];
        let corner = |x| Tiling { sizes: &[88, 13], tile: &tile, x, swizzle };
        corner(&[8, 2]).load("conformance_tma_load_2d");
        corner(&[80, 5]).store("conformance_tma_store_2d");
    }
    // A convolution's halo: pixels of the second image from its upper left corner on.
    let (sizes, tile) = ([40, 7, 5, 2], [32, 4, 3, 1]);
    let images = Tiling { sizes: &sizes, tile: &tile, x: &[8, -1, -1, 1], swizzle: 2 };
    images.load("conformance_tma_load_4d");
    Tiling { x: &[16, 5, 3, 0], ..images }.store("conformance_tma_store_4d");
    Tiling { sizes: &[64, 9, 20], tile: &[64, 1, 16], x: &[0, 4, 8], swizzle: 3 }.load("conformance_tma_load_3d");
}

respodiff::params! {
    /// The position of a tile, for a descriptor.
    #[derive(Debug)]
    pub struct Tile {
        swizzle: u32,
        start: u32,
        leading: u32,
        stride: u32,
        step: u32,
    }

    pub struct WgmmaParams {
        shared: u64,
        a: u64,
        d: u64,
        words: u32,
        scale_d: u32,
        of_a: Tile,
        of_b: Tile,
    }
}

/// Two steps of K.
const DEPTH: usize = 32;

/// Shared memory in wgmma's canonical layouts.
#[derive(Default)]
struct Shared(Vec<u16>);

impl Shared {
    /// Adds a matrix of `rows` rows along K or, if `across`, of K rows with `rows` columns each, which only B may be.
    fn add(&mut self, rows: usize, across: bool, swizzle: u32, of: impl Fn(usize, usize) -> f64) -> Tile {
        let start = self.0.len() * 2;
        let span = 16 << swizzle;
        // From a span of columns, or without a swizzle from eight k, to the next.
        let further = if swizzle == 0 { rows / 8 * 128 } else { DEPTH * span };
        let place = |row: usize, k: usize| match (across, swizzle) {
            (false, 0) => row / 8 * 512 + row % 8 * 16 + k / 8 * 128 + k % 8 * 2,
            // A span contains one step; the next step is another tile.
            (false, 1) => k / 16 * rows * 32 + row * 32 + k % 16 * 2,
            (false, _) => row * span + k * 2,
            (true, 0) => row / 8 * 128 + row % 8 * 2 + k / 8 * further + k % 8 * 16,
            (true, _) => row / (span / 2) * further + k * span + row % (span / 2) * 2,
        };
        // Distances in bytes as the descriptor and the kernel expect them.
        let (leading, stride, step) = match (across, swizzle) {
            (false, 0) => (128, 512, 256),
            (false, 1) => (16, 256, rows * 32),
            (false, _) => (16, 8 * span, 32),
            (true, 0) => (further, 128, 2 * further),
            (true, _) => (further, 8 * span, 16 * span),
        };
        for (row, k) in (0..rows).flat_map(|row| (0..DEPTH).map(move |k| (row, k))) {
            let at = (start + swizzled(place(row, k), swizzle)) / 2;
            if at >= self.0.len() {
                // Nothing but the matrix may be read, so the gaps are NaN. The next tile begins at a whole swizzle
                // pattern.
                self.0.resize((at + 1).next_multiple_of(512), 0x7e00);
            }
            self.0[at] = f16::from_f64(of(row, k)).to_bits();
        }
        let [start, leading, stride, step] = [start, leading, stride, step].map(|n| n as u32);
        Tile { swizzle, start, leading, stride, step }
    }
}

fn wgmma(kernel: &'static str, columns: usize, from_registers: bool, across: bool) {
    for swizzle in 0..4 {
        let exact = swizzle != 3;
        let scale_d = swizzle % 2;
        let a = numbers(64 * DEPTH, 17, exact);
        let b = numbers(DEPTH * columns, 18, exact);
        let c = numbers(64 * columns, 19, exact);
        let mut shared = Shared::default();
        let of_a = shared.add(64, false, swizzle, |row, k| if from_registers { f64::NAN } else { a[row * DEPTH + k] });
        let of_b = shared.add(columns, across, swizzle, |column, k| b[k * columns + column]);
        let (mut registers, mut before, mut truth) = (Vec::new(), Vec::new(), Vec::new());
        for thread in 0..128 {
            let (warp, lane) = (thread / 32, thread % 32);
            for (step, r) in (0..2).flat_map(|step| (0..4).map(move |r| (step, r))) {
                let (row, column) = place_of_a(lane, r);
                let at = (warp * 16 + row) * DEPTH + step * 16 + column;
                registers.push(if from_registers { pair(a[at], a[at + 1]) } else { !0 });
            }
            for r in 0..columns / 2 {
                let (row, column) = place_of_d(lane, r);
                let row = warp * 16 + row;
                let held = if scale_d == 1 { c[row * columns + column] } else { f64::NAN };
                before.push((held as f32).to_bits());
                let factors = (0..DEPTH).map(|k| (a[row * DEPTH + k], b[k * columns + column]));
                truth.push(product(if scale_d == 1 { held } else { 0.0 }, factors, exact));
            }
        }
        let case = format!("{}_swizzle{}", &kernel["conformance_".len()..], [0, 32, 64, 128][swizzle as usize]);
        let outputs = outputs(&case, true, &before, |device, d| {
            let image = Buffer::from_bytes(device, bytemuck::cast_slice(&shared.0)).unwrap();
            let a = Buffer::from_bytes(device, bytemuck::cast_slice(&registers)).unwrap();
            let bytes = image.len();
            let params = WgmmaParams {
                shared: image.address(),
                a: a.address(),
                d,
                words: bytes as u32 / 4,
                scale_d,
                of_a,
                of_b,
            };
            (vec![Launch::new(kernel, [1, 1, 1], 128, bytes, &params)], vec![image, a])
        });
        near(&outputs, &truth);
    }
}

macro_rules! wgmma {
    ($($test:ident $columns:literal,)*) => {$(
        #[test]
        pub fn $test() {
            const NAMES: [&str; 4] = [
                concat!("conformance_wgmma_m64n", $columns, "k16_tb0"),
                concat!("conformance_wgmma_m64n", $columns, "k16_tb1"),
                concat!("conformance_wgmma_m64n", $columns, "k16_rs_tb0"),
                concat!("conformance_wgmma_m64n", $columns, "k16_rs_tb1"),
            ];
            for (i, name) in NAMES.into_iter().enumerate() {
                wgmma(name, $columns, i / 2 == 1, i % 2 == 1);
            }
        }
    )*};
}
wgmma! { wgmma_n32 32, wgmma_n40 40, wgmma_n64 64, wgmma_n80 80, wgmma_n128 128, wgmma_n160 160, wgmma_n256 256, }
