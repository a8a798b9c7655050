//! `kernels/conformance*.cu`: tests every wrapper of `kernels/ptx*.cuh` against the PTX manual, whose results are
//! derived here without the emulator's help.
//!
//! Most comparisons are bit for bit. Products of integers are exact in any order of summation; other products may lose,
//! for each addend, one unit in the last place of the greatest addend, which is the bound used here.
//!
//! With RESPODIFF_TEST_DEVICE=cuda and RESPODIFF_RECORD=FOLDER the outputs of a GPU are written there. The recordings
//! in tests/conformance are held to the same expectations as the emulator's outputs, and the emulator's outputs to
//! them.

mod hopper;

use super::{devices, random, support};
use half::f16;
use respodiff::cuda::{Buffer, CudaDevice, Launch, Limits};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

respodiff::params! {
    pub struct ConformanceParams {
        input: u64,
        out: u64,
    }
}

/// The layouts of these kernels' structures in Rust.
pub fn layouts() -> Vec<respodiff_emulated_kernels::Layout> {
    let hopper = [hopper::TmaParams::layout(), hopper::Tile::layout(), hopper::WgmmaParams::layout()];
    [vec![ConformanceParams::layout()], hopper.into()].concat()
}

/// Launches, and the memory that they need besides their output.
type Prepared = (Vec<Launch>, Vec<Buffer>);

/// The outputs of a case, each with the name of the device that computed it.
type Outputs = Vec<(String, Vec<u32>)>;

thread_local! {
    /// The cases that this thread's tests asked for, if they are only to be named and not run.
    static NAMED: RefCell<Option<BTreeSet<String>>> = const { RefCell::new(None) };
}

/// The folder of the recordings.
fn recordings() -> PathBuf {
    support::root().join("tests/conformance")
}

/// The words that a case leaves in memory which contained `before`: from every device, and from the GPU that was
/// recorded. `hopper` is true for wrappers that only sm_90a has.
fn outputs(
    case: &str,
    hopper: bool,
    before: &[u32],
    prepare: impl Fn(&Arc<dyn CudaDevice>, u64) -> Prepared,
) -> Outputs {
    if let Some(new) = NAMED.with_borrow_mut(|names| names.as_mut().map(|names| names.insert(case.into()))) {
        assert!(new, "two cases are named {case}: they would share a recording");
        return Vec::new();
    }
    let file = recordings().join(format!("{case}.safetensors"));
    let mut outputs = Vec::new();
    for (label, device) in devices(Limits::H100) {
        let emulated = device.name() == "emulated";
        if hopper && !emulated && device.limits().capability != 90 {
            continue;
        }
        let memory = Buffer::from_bytes(&device, bytemuck::cast_slice(before)).unwrap();
        let (launches, _inputs) = prepare(&device, memory.address());
        // SAFETY: the launches' memory is alive.
        unsafe { device.run(&launches) }.unwrap_or_else(|fault| panic!("{case}, {label}: {fault}"));
        let mut words = vec![0u32; before.len()];
        memory.read(0, bytemuck::cast_slice_mut(&mut words)).unwrap_or_else(|fault| panic!("{case}, {label}: {fault}"));
        if let Some(folder) = std::env::var_os("RESPODIFF_RECORD").filter(|_| !emulated).map(PathBuf::from) {
            let view = TensorView::new(Dtype::U32, vec![words.len()], bytemuck::cast_slice(&words)).unwrap();
            std::fs::create_dir_all(&folder).unwrap();
            safetensors::serialize_to_file([("output", view)], None, &folder.join(format!("{case}.safetensors")))
                .unwrap();
        }
        outputs.push((format!("{case}, {label}"), words));
    }
    if file.exists() {
        let bytes = std::fs::read(&file).unwrap();
        let recorded = SafeTensors::deserialize(&bytes).unwrap();
        let words = bytemuck::pod_collect_to_vec(recorded.tensor("output").unwrap().data());
        outputs.push((format!("{case}, recorded on a GPU"), words));
    }
    outputs
}

/// The outputs of a kernel that takes [`ConformanceParams`]: `length` words, poisoned where none was written.
fn words_of(
    case: &str,
    kernel: &'static str,
    hopper: bool,
    [block, shared]: [usize; 2],
    input: &[u32],
    length: usize,
) -> Outputs {
    outputs(case, hopper, &vec![!0; length], |device, out| {
        let memory = Buffer::from_bytes(device, bytemuck::cast_slice(input)).unwrap();
        let params = ConformanceParams { input: memory.address(), out };
        (vec![Launch::new(kernel, [1, 1, 1], block, shared, &params)], vec![memory])
    })
}

/// Checks a kernel of one warp or more whose output is known bit for bit.
fn exactly(kernel: &'static str, hopper: bool, block: usize, shared: usize, input: &[u32], expected: &[u32]) {
    let case = &kernel["conformance_".len()..];
    same(&words_of(case, kernel, hopper, [block, shared], input, expected.len()), expected);
}

fn same(outputs: &Outputs, expected: &[u32]) {
    for (label, words) in outputs {
        assert_eq!(words.len(), expected.len(), "{label}");
        if let Some(i) = (0..words.len()).find(|&i| words[i] != expected[i]) {
            panic!("{label}: word {i} is {:#010x}, and {:#010x} is right", words[i], expected[i]);
        }
    }
}

/// Checks that floats are within bounds of the truth, and as close to each other: the same bits on every device where
/// the bound is 0.
fn near(outputs: &Outputs, truth: &[(f64, f64)]) {
    let number = |word: u32| f32::from_bits(word) as f64;
    for (label, words) in outputs {
        assert_eq!(words.len(), truth.len(), "{label}");
        let (first_label, first) = &outputs[0];
        for (i, (&word, &(right, bound))) in words.iter().zip(truth).enumerate() {
            let x = number(word);
            // NaN fails every comparison with a bound.
            assert!(
                (x - right).abs() <= bound,
                "{label}: number {i} is {x} where {right} is right; off by more than {bound:e}"
            );
            let alike = word == first[i] || (bound > 0.0 && (x - number(first[i])).abs() <= bound);
            assert!(alike, "{label}: number {i} is {x}, and {} for {first_label}", number(first[i]));
        }
    }
}

fn noise(length: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    };
    (0..length).map(|_| next()).collect()
}

/// Numbers for products: integers whose products and sums are exact, or fractions in -1..1.
fn numbers(length: usize, seed: u64, exact: bool) -> Vec<f64> {
    let scale = |x: &f64| if exact { (x * 8.0).round() } else { *x };
    random(length, seed).iter().map(scale).collect()
}

/// Two halves in a register, the first one in the lower bits.
fn pair(low: f64, high: f64) -> u32 {
    let bits = |x| f16::from_f64(x).to_bits() as u32;
    bits(low) | bits(high) << 16
}

/// A lane's groupID and threadID_in_group.
fn group(lane: usize) -> (usize, usize) {
    (lane / 4, lane % 4)
}

/// Row and first column of register `r` of A's fragment, 16x16.
fn place_of_a(lane: usize, r: usize) -> (usize, usize) {
    let (g, t) = group(lane);
    (g + 8 * (r % 2), 2 * t + 8 * (r / 2))
}

/// First row and column of register `r` of B's fragment, 16x8.
fn place_of_b(lane: usize, r: usize) -> (usize, usize) {
    let (g, t) = group(lane);
    (2 * t + 8 * r, g)
}

/// Row and column of register `r` of D's fragment, 16x8; registers from 4 on belong to the next 8 columns.
fn place_of_d(lane: usize, r: usize) -> (usize, usize) {
    let (g, t) = group(lane);
    (g + 8 * (r / 2 % 2), r / 4 * 8 + 2 * t + r % 2)
}

/// An element of C + A * B, and the error bound of a sum in fp32; see above.
fn product(c: f64, factors: impl Iterator<Item = (f64, f64)>, exact: bool) -> (f64, f64) {
    let (mut sum, mut size, mut addends) = (c, c.abs(), 1);
    for (a, b) in factors {
        sum += a * b;
        size += (a * b).abs();
        addends += 1;
    }
    (sum, if exact { 0.0 } else { addends as f64 * 2f64.powi(-23) * size })
}

/// The order in which the kernels' lanes supply row addresses.
fn shuffled(lane: usize) -> usize {
    (lane * 5 + 3) % 32
}

#[test]
fn shared_addresses() {
    let input: Vec<u32> = noise(32, 1).iter().map(|x| x % 256).collect();
    let mut expected: Vec<u32> = input.iter().map(|x| x * 4).collect();
    expected.push(0);
    exactly("conformance_shared", false, 32, 1024, &input, &expected);
}

#[test]
fn exp2() {
    // The manual's bound is 2^-22 of the result; subnormal results are 0.
    let mut input: Vec<f32> = random(27, 3).iter().map(|x| (x * 60.0 - 50.0) as f32).collect();
    input.extend([0.0, 1.0, -125.5, -130.0, f32::NEG_INFINITY]);
    let truth =
        |&x: &f32| if x < -126.0 { (0.0, 0.0) } else { ((x as f64).exp2(), (x as f64).exp2() * 2f64.powi(-22)) };
    let truth: Vec<(f64, f64)> = input.iter().map(truth).collect();
    let input: Vec<u32> = input.iter().map(|x| x.to_bits()).collect();
    near(&words_of("exp2_approx", "conformance_exp2_approx", false, [32, 0], &input, 32), &truth);
}

#[test]
fn rcp() {
    // The manual's bound is one unit in the last place, 2^-23 of the result; subnormal numbers are 0.
    let mut input: Vec<f32> = random(24, 31).iter().map(|x| (x * 40.0).exp2() as f32).collect();
    input.extend([
        1.0,
        -3.0,
        2f32.powi(125),
        -(2f32.powi(-125)),
        f32::INFINITY,
        f32::NEG_INFINITY,
        2f32.powi(127),
        0.36,
    ]);
    let truth = |&x: &f32| match 1.0 / f64::from(x) {
        y if y.abs() < 2f64.powi(-126) => (0.0, 0.0),
        y => (y, y.abs() * 2f64.powi(-23)),
    };
    let truth: Vec<(f64, f64)> = input.iter().map(truth).collect();
    let input: Vec<u32> = input.iter().map(|x| x.to_bits()).collect();
    near(&words_of("rcp_approx", "conformance_rcp_approx", false, [32, 0], &input, 32), &truth);
}

#[test]
fn to_half() {
    let mut input: Vec<f32> = random(20, 4).iter().map(|x| (x.powi(5) * 7e4) as f32).collect();
    // Halves are 32 apart below 65504, and subnormal below 2^-14; ties go to the even one.
    input.extend([0.0, -0.0, 65504.0, -65519.9, 65520.0, -1e30, f32::INFINITY, f32::NEG_INFINITY]);
    input.extend([f32::NAN, -65488.0, 2f32.powi(-25) * 3.0, -(2f32.powi(-26))]);
    let half = |x: f32| if x.is_nan() { 0x7fff } else { f16::from_f32(x.clamp(-65504.0, 65504.0)).to_bits().into() };
    let single = input.iter().map(|&x| half(x));
    let pairs = (0..32).map(|i| half(input[i]) | half(input[i ^ 1]) << 16);
    let expected: Vec<u32> = single.chain(pairs).collect();
    let input: Vec<u32> = input.iter().map(|x| x.to_bits()).collect();
    exactly("conformance_to_half", false, 32, 0, &input, &expected);
}

#[test]
fn cp_async() {
    for (kernel, width) in [("conformance_cp_async4", 1), ("conformance_cp_async8", 2), ("conformance_cp_async16", 4)] {
        let input = noise(64 * width, 4);
        let copied = |i: usize| {
            let (group, lane, word) = (i / width / 32, i / width % 32, i % width);
            let other = shuffled(lane);
            if group == 0 && other.is_multiple_of(3) { 0 } else { input[(group * 32 + other) * width + word] }
        };
        let expected: Vec<u32> = (0..64 * width).map(copied).collect();
        exactly(kernel, false, 32, 256 * width, &input, &expected);
    }
}

#[test]
fn ldmatrix() {
    let input = noise(128, 5);
    let half = |matrix: usize, row: usize, column: usize| {
        input[shuffled(8 * matrix + row) * 4 + column / 2] >> (column % 2 * 16) & 0xffff
    };
    let expected = |trans: bool| -> Vec<u32> {
        let register = |i: usize| {
            let (matrix, (g, t)) = (i % 4, group(i / 4));
            let part = |k| if trans { half(matrix, 2 * t + k, g) } else { half(matrix, g, 2 * t + k) };
            part(0) | part(1) << 16
        };
        (0..128).map(register).collect()
    };
    exactly("conformance_ldmatrix_x4", false, 32, 512, &input, &expected(false));
    exactly("conformance_ldmatrix_x4_trans", false, 32, 512, &input, &expected(true));
}

/// `tall` x `wide` products of 16x8, from fragments to fragments.
fn mma(kernel: &'static str, tall: usize, wide: usize) {
    for exact in [true, false] {
        let a = numbers(tall * 16 * 16, 6, exact);
        let b = numbers(16 * wide * 8, 7, exact);
        let c = numbers(tall * 16 * wide * 8, 8, exact);
        let columns = wide * 8;
        let (mut input, mut truth) = (Vec::new(), Vec::new());
        for lane in 0..32 {
            for (i, r) in (0..tall).flat_map(|i| (0..4).map(move |r| (i, r))) {
                let (row, column) = place_of_a(lane, r);
                let at = (i * 16 + row) * 16 + column;
                input.push(pair(a[at], a[at + 1]));
            }
            for (j, r) in (0..wide).flat_map(|j| (0..2).map(move |r| (j, r))) {
                let (row, column) = place_of_b(lane, r);
                let at = |row: usize| row * columns + j * 8 + column;
                input.push(pair(b[at(row)], b[at(row + 1)]));
            }
            for (i, r) in (0..tall).flat_map(|i| (0..4 * wide).map(move |r| (i, r))) {
                let (row, column) = place_of_d(lane, r);
                let row = i * 16 + row;
                let before = c[row * columns + column];
                input.push((before as f32).to_bits());
                let factors = (0..16).map(|k| (a[row * 16 + k], b[k * columns + column]));
                truth.push(product(before, factors, exact));
            }
        }
        let case = format!("{}_{}", &kernel["conformance_".len()..], if exact { "integers" } else { "fractions" });
        near(&words_of(&case, kernel, false, [32, 0], &input, truth.len()), &truth);
    }
}

#[test]
fn mma_m16n8k16() {
    mma("conformance_mma_m16n8k16", 1, 1);
}

#[test]
fn mma_tile() {
    mma("conformance_mma_tile", 2, 3);
}

#[test]
fn shuffles() {
    let input = noise(64, 9);
    let x = &input[..32];
    let votes = (0..32).fold(0, |votes, lane| votes | (x[lane] & 1) << lane);
    let results: [&dyn Fn(usize) -> u32; 12] = [
        &|lane| x[input[32 + lane] as usize % 32],
        &|lane| x[lane / 8 * 8 + input[32 + lane] as usize % 8],
        &|lane| x[lane ^ 5],
        &|lane| x[lane ^ 3],
        &|lane| if lane >= 3 { x[lane - 3] } else { x[lane] },
        &|lane| if lane % 8 >= 3 { x[lane - 3] } else { x[lane] },
        &|lane| if lane + 3 < 32 { x[lane + 3] } else { x[lane] },
        &|lane| if lane % 8 + 3 < 8 { x[lane + 3] } else { x[lane] },
        &|_| votes,
        &|_| (votes != 0) as u32,
        &|_| (votes == !0) as u32,
        &|_| 1,
    ];
    let expected: Vec<u32> = results.iter().flat_map(|result| (0..32).map(result)).collect();
    exactly("conformance_shuffles", false, 32, 0, &input, &expected);
}

#[test]
fn named_barriers() {
    let input = noise(64, 10);
    let expected: Vec<u32> = input.iter().rev().copied().collect();
    exactly("conformance_named_barriers", false, 128, 256, &input, &expected);
}

/// Each launch of a list works on the results of the one before. On compute capability 9.0, launches begin early, and
/// would see older data if they did not wait.
#[test]
fn griddep() {
    let (input, mut expected) = (noise(32, 11), noise(32, 12));
    let outputs = outputs("griddep", false, &expected, |device, out| {
        let memory = Buffer::from_bytes(device, bytemuck::cast_slice(&input)).unwrap();
        let params = ConformanceParams { input: memory.address(), out };
        (vec![Launch::new("conformance_griddep", [1, 1, 1], 32, 0, &params); 50], vec![memory])
    });
    for _ in 0..50 {
        expected = (0..32).map(|i| expected[shuffled(i)].wrapping_mul(5).wrapping_add(input[i])).collect();
    }
    same(&outputs, &expected);
}

/// A recording without a case would not constrain the emulator at all.
#[test]
fn every_recording_is_of_a_case() {
    let tests: [fn(); 22] = [
        shared_addresses,
        exp2,
        rcp,
        to_half,
        cp_async,
        ldmatrix,
        mma_m16n8k16,
        mma_tile,
        shuffles,
        named_barriers,
        griddep,
        hopper::stmatrix,
        hopper::mbarriers,
        hopper::setmaxnreg,
        hopper::tma,
        hopper::wgmma_n32,
        hopper::wgmma_n40,
        hopper::wgmma_n64,
        hopper::wgmma_n80,
        hopper::wgmma_n128,
        hopper::wgmma_n160,
        hopper::wgmma_n256,
    ];
    NAMED.set(Some(BTreeSet::new()));
    tests.iter().for_each(|test| test());
    let cases = NAMED.take().unwrap();
    let files = std::fs::read_dir(recordings()).unwrap().map(|entry| entry.unwrap().path());
    let recorded = files.filter(|file| file.extension().is_some_and(|e| e == "safetensors"));
    let recorded: Vec<String> = recorded.map(|file| file.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    assert!(!recorded.is_empty(), "{} holds no recordings", recordings().display());
    let stray: Vec<&String> = recorded.iter().filter(|name| !cases.contains(*name)).collect();
    assert!(stray.is_empty(), "recordings without a case: {stray:?}; delete them, or list their tests here");
}
