//! Plants faults and expects the emulator to report them; runs the correct kernels many times and expects no reports.

use respodiff_emulator_faults::{Fault, Landing, List, Memory, Order, Schedule, TensorMap, launch};

// ---- memory -----------------------------------------------------------------------------------

/// The fp16 bits of a small integer.
fn half(x: i32) -> u16 {
    let magnitude = x.unsigned_abs();
    assert!(magnitude < 2048);
    let sign = if x < 0 { 0x8000 } else { 0 };
    if magnitude == 0 {
        return 0;
    }
    let exponent = 31 - magnitude.leading_zeros();
    sign | ((exponent + 15) << 10) as u16 | ((magnitude << (10 - exponent)) & 0x3ff) as u16
}

/// Small integers, so that every sum here is exact in fp32 whatever its order.
fn numbers(n: usize, seed: usize) -> Vec<i32> {
    (0..n).map(|i| ((i * 7 + seed * 5 + i / 13) % 9) as i32 - 4).collect()
}

fn halves(numbers: &[i32]) -> Memory {
    let memory = Memory::new(numbers.len() * 2);
    for (i, &x) in numbers.iter().enumerate() {
        // SAFETY: inside the memory just made.
        unsafe { (memory.address() as *mut u16).add(i).write(half(x)) };
    }
    memory
}

fn floats(memory: &Memory) -> Vec<f32> {
    // SAFETY: plain memory of as many floats.
    unsafe { std::slice::from_raw_parts(memory.address() as *const f32, memory.len() / 4).to_vec() }
}

// ---- kernels ----------------------------------------------------------------------------------

/// The outcome of a run.
#[derive(Debug)]
enum Outcome {
    Right,
    Wrong,
    Caught(String),
}

fn outcome(run: Result<(), Fault>, out: &Memory, expected: &[f32]) -> Outcome {
    match run {
        Err(fault) => Outcome::Caught(fault.0),
        Ok(()) if floats(out) == expected => Outcome::Right,
        Ok(()) => Outcome::Wrong,
    }
}

fn start(kernel: &str, grid: u32, block: u32, shared: u32, params: &[u64], schedule: &Schedule) -> Result<(), Fault> {
    let bytes: Vec<u8> = params.iter().flat_map(|word| word.to_le_bytes()).collect();
    // SAFETY: every caller's parameters are the kernel's, or are refused by their size; faults are caught by the
    // emulator.
    unsafe { launch(kernel, [grid, 1, 1], block, shared, &bytes, schedule) }.map(drop)
}

/// Packs two 32-bit numbers into one parameter word.
fn pair(low: usize, high: i32) -> u64 {
    low as u64 | (high as u64) << 32
}

fn plain(kernel: &str, fault: i32, schedule: &Schedule) -> Outcome {
    let (length, grid, block, shared) = match kernel {
        "reduce" => (1000, 3, 128, 16),
        "exchange" => (32, 1, 32, 128),
        "stream" => (5 * 1024, 1, 128, 4096),
        "narrow" => (32 * 8, 1, 32, 512),
        "pool" => (512, 1, 512, 0),
        _ => unreachable!("{kernel}"),
    };
    let x = numbers(length, 1);
    let sum = |of: &dyn Fn(i32) -> i32| x.iter().map(|&x| of(x)).sum::<i32>() as f32;
    let expected: Vec<f32> = match kernel {
        "reduce" => vec![sum(&|x| x) + sum(&|x| x * x); 128 * 3],
        "exchange" => x.iter().rev().map(|&x| x as f32).collect(),
        "pool" => x.iter().map(|&x| x as f32).collect(),
        "stream" => {
            let of = |t: usize| x.iter().skip((t + 1) % 128).step_by(128).sum::<i32>() as f32;
            (0..128).map(of).collect()
        }
        _ => {
            let row = |r: usize| (0..8).map(|i| (i as i32 + 1) * x[r * 8 + i]).sum::<i32>() as f32;
            (0..32).map(|lane| row(if lane < 16 { lane } else { 31 - lane })).collect()
        }
    };
    let (input, out) = (halves(&x), Memory::new(expected.len() * 4));
    let params = [input.address(), out.address(), pair(length, fault)];
    outcome(start(kernel, grid, block, shared, &params, schedule), &out, &expected)
}

/// The words of a structure of tensor maps and other words; its size is a multiple of a map's.
fn structure(maps: &[TensorMap], others: &[u64]) -> Vec<u64> {
    let mut words: Vec<u64> = maps.iter().flat_map(|map| map.0).chain(others.iter().copied()).collect();
    words.resize(words.len().next_multiple_of(size_of::<TensorMap>() / size_of::<u64>()), 0);
    words
}

/// A[rows][depth] times the transpose of B[columns][depth].
fn matmul(a: &[i32], b: &[i32], depth: usize) -> Vec<f32> {
    let dot = |a: &[i32], b: &[i32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<i32>() as f32;
    a.chunks(depth).flat_map(|a| b.chunks(depth).map(move |b| dot(a, b))).collect()
}

fn product(fault: i32, schedule: &Schedule) -> Outcome {
    let (tiles, depth) = (5, 5 * 64);
    let (a, b) = (numbers(64 * depth, 1), numbers(128 * depth, 2));
    let (a_memory, b_memory, out) = (halves(&a), halves(&b), Memory::new(64 * 128 * 4));
    let map = |memory: &Memory, rows: u32| {
        let sizes = [depth as u64, rows.into()];
        TensorMap::tiled(memory.address(), 2, &sizes, &[depth as u64 * 2], &[64, rows], 3).unwrap()
    };
    let params = structure(&[map(&a_memory, 64), map(&b_memory, 128)], &[out.address(), pair(tiles, fault)]);
    let shared = 2 * (64 + 128) * 128 + 32;
    outcome(start("product", 1, 256, shared, &params, schedule), &out, &matmul(&a, &b, depth))
}

/// `layout` is n, the swizzle, and 1 if the operands are contiguous along m and n rather than k.
fn stored(layout: (usize, i32, i32), fault: i32, schedule: &Schedule) -> Outcome {
    let (n, swizzle, mn_major) = layout;
    let (a, b) = (numbers(64 * 64, 1), numbers(n * 64, 2));
    let (a_memory, b_memory, out) = (halves(&a), halves(&b), Memory::new(64 * n * 4));
    let map = TensorMap::tiled(out.address(), 4, &[n as u64, 64], &[n as u64 * 4], &[n as u32, 64], 0).unwrap();
    let others = [a_memory.address(), b_memory.address(), pair(n, swizzle), pair(mn_major as usize, fault)];
    let params = structure(&[map], &others);
    let shared = (64 * 128 + 256 * 128 + 64 * n * 4) as u32;
    outcome(start("stored", 1, 128, shared, &params, schedule), &out, &matmul(&a, &b, 64))
}

/// Three launches of a list. The second and the third each work on the results of the one before. The last has the
/// fault.
fn chain(fault: i32, schedule: &Schedule) -> Outcome {
    let (length, blocks) = (64, 2);
    let memory_of = |numbers: &[f32]| {
        let memory = Memory::new(numbers.len() * 4);
        // SAFETY: as many floats as the memory has.
        unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), memory.address() as *mut f32, numbers.len()) };
        memory
    };
    let given: Vec<f32> = (0..length).map(|i| (i * i % 23) as f32).collect();
    let constant: Vec<f32> = (0..32).map(|i| (i * 7 % 16) as f32).collect();
    let of = |before: &[f32]| -> Vec<f32> { (0..length).map(|i| before[31 - i % 32] + constant[i % 32]).collect() };
    let [x, c] = [&given, &constant].map(|numbers| memory_of(numbers));
    let [first, second, third] = [(); 3].map(|()| Memory::new(length * 4));
    let mut list = List::new();
    let mut next = |before: &Memory, out: &Memory, fault: i32| {
        let map = TensorMap::tiled(before.address(), 4, &[32, 1], &[128], &[32, 1], 0).unwrap();
        let params = structure(&[map], &[c.address(), before.address(), out.address(), pair(fault as usize, 0)]);
        let bytes: Vec<u8> = params.iter().flat_map(|word| word.to_le_bytes()).collect();
        // SAFETY: the parameters are the kernel's; its faults are caught by the emulator.
        unsafe { list.launch("chain", [blocks, 1, 1], 32, 144, &bytes, schedule) }.map(drop)
    };
    let run = next(&x, &first, 0).and_then(|()| next(&first, &second, 0)).and_then(|()| next(&first, &third, fault));
    match run {
        Ok(()) if floats(&second) != of(&of(&given)) => Outcome::Wrong,
        run => outcome(run, &third, &of(&of(&given))),
    }
}

fn run(kernel: &str, fault: i32, schedule: &Schedule) -> Outcome {
    match kernel {
        "chain" => chain(fault, schedule),
        "product" => product(fault, schedule),
        "stored" => stored((64, 3, 0), fault, schedule),
        _ => plain(kernel, fault, schedule),
    }
}

// ---- the faults -------------------------------------------------------------------------------

/// The kernel, the fault, words of the message, and the outcome that each schedule of `Schedule::hostile` must have:
/// `F` the message, `w` a wrong result, `.` nothing, `?` any (it depends on the seed, or on how a compiler translates
/// the kernel).
#[rustfmt::skip]
const FAULTS: &[(&str, i32, &str, &str)] = &[
    ("reduce", 1, "shared-memory race", "????F"),
    ("reduce", 2, "shared-memory race", "????F"),
    ("reduce", 3, "out of bounds: 2 bytes of global memory read|0 bytes past the end of a 2000-byte", "FFFFF"),
    ("reduce", 4, "out of bounds: 4 bytes of global memory written|past the end of a 1536-byte", "FFFFF"),
    ("reduce", 5, "out of bounds|past the end of the block's 16 bytes of shared memory", "FFFFF"),
    ("reduce", 6, "deadlock|the other lanes of shfl, mask 0xffffffff", "FFFFF"),
    ("reduce", 7, "deadlock|__syncthreads|32 of 128 threads arrived|faults.cu:", "FFFFF"),
    ("reduce", 8, "divergent barrier|another __syncthreads at faults.cu:", "FFFFF"),
    ("reduce", 9, "misaligned|16 bytes", "FFFFF"),
    ("reduce", 10, "out of bounds: 32 bytes of global memory read", "FFFFF"),
    ("reduce", 11, "out of bounds: 18 bytes of global memory read", "FFFFF"),
    ("reduce", 12, "out of bounds|written|in no buffer", "FFFFF"),
    ("reduce", 13, "shfl: the calling lane is not in the mask", "FFFFF"),
    ("reduce", 14, "divergent barrier: barrier 1 used with count", "FFFFF"),
    ("reduce", 15, "out of bounds|written|0 bytes past the end of a 2000-byte", "FFFFF"),
    ("reduce", 16, "deadlock|named barrier 2: 96 of 128 threads arrived", "FFFFF"),
    ("reduce", 17, "divergent warp: vote with mask|overlaps", "FFFFF"),
    ("reduce", 18, "width 12", "FFFFF"),
    ("reduce", 19, "shared-memory race|written by thread|earlier written by thread", "....F"),
    ("reduce", 20, "out of bounds|bytes before a 1536-byte", "FFFFF"),
    ("exchange", 1, "shared-memory race", "????F"),
    ("stream", 1, "cp.async operations in flight", ".F.FF"),
    ("stream", 2, "cp.async operations in flight", ".F.FF"),
    ("stream", 3, "shared-memory race|read by thread|earlier written by thread", "????F"),
    ("stream", 4, "shared-memory race|written by thread|earlier read by thread", "????F"),
    ("stream", 5, "cp.async: misaligned: shared address", "FFFFF"),
    ("stream", 6, "out of bounds: 16 bytes of global memory read", "FFFFF"),
    ("stream", 7, "cp.async: out of bounds: shared address", "FFFFF"),
    ("stream", 8, "cp.async operations in flight", ".F.FF"),
    ("stream", 9, "cp.async: misaligned: global address", "FFFFF"),
    ("stream", 10, "cp.async operations in flight", ".F.FF"),
    ("narrow", 1, "shared-memory race", "????F"),
    ("narrow", 2, "ldmatrix: misaligned", "FFFFF"),
    ("narrow", 3, "divergent warp|ldmatrix", "FFFFF"),
    ("narrow", 4, "shared-memory race", "????F"),
    ("product", 1, "shared-memory race|read by the tensor core|written by a TMA load", "????F"),
    ("product", 2, "mbarrier", "FFFFF"),
    ("product", 3, "deadlock|mbarrier|tx-count 16 bytes pending", "FFFFF"),
    ("product", 4, "deadlock|mbarrier|tx-count -16 bytes pending", "FFFFF"),
    ("product", 5, "shared-memory race|written by a TMA load|read by the tensor core", "????F"),
    ("product", 6, "without a wgmma.fence", "FFFFF"),
    ("product", 7, "mbarrier|initialisation|missing barrier", "????F"),
    ("product", 8, "mbarrier|initialised twice", "FFFFF"),
    ("product", 9, "mbarrier|used before mbarrier.init", "FFFFF"),
    ("product", 10, "accumulator register 3|touched while the wgmma was in flight", "FFFFF"),
    ("product", 11, "exits with wgmma operations in flight", "wFwFF"),
    ("product", 12, "mbarrier|overwritten by ordinary stores", "FFFFF"),
    ("product", 13, "deadlock|wgmma", "?FFFF"),
    ("product", 14, "exits with TMA loads into its shared memory in flight", ".F.FF"),
    ("product", 15, "more arrivals in this phase than its count 1", "FFFFF"),
    ("product", 16, "TMA load: misaligned", "FFFFF"),
    ("product", 17, "shared-memory race|written by a TMA load|read by the tensor core", "????F"),
    ("stored", 1, "missing fence.proxy.async|read by the tensor core", "....F"),
    ("stored", 2, "shared-memory race|read by the tensor core", "????F"),
    ("stored", 3, "base offset", "FFFFF"),
    ("stored", 4, "wgmma descriptor: out of bounds", "FFFFF"),
    ("stored", 5, "issue different wgmma", "FFFFF"),
    ("stored", 6, "shared-memory race|tensor core", "????F"),
    ("stored", 7, "missing fence.proxy.async|read by a TMA store", "....F"),
    ("stored", 8, "shared-memory race|read by a TMA store", "????F"),
    ("stored", 9, "exits with a TMA store in flight", ".F.FF"),
    ("stored", 10, "shared-memory race|earlier read by a TMA store", "????F"),
    ("stored", 11, "TMA store: illegal instruction|coordinate -1 along dimension 1", "FFFFF"),
    ("pool", 1, "deadlock|setmaxnreg.inc to 168: the block has", "FFFFF"),
    ("pool", 2, "setmaxnreg.dec to 136 of a thread that has 128 registers", "FFFFF"),
    ("pool", 3, "setmaxnreg.inc to 120 of a thread that has 128 registers", "FFFFF"),
    ("pool", 4, "deadlock|the other lanes of __syncwarp", "FFFFF"),
    ("pool", 5, "deadlock|setmaxnreg.inc to 160: the block has 0 registers to spare", "FFFFF"),
    ("chain", 1, "faults.cu|missing griddep_wait|read, 0 bytes into a 256-byte global buffer", "FFFFF"),
    ("chain", 2, "faults.cu|missing griddep_wait|4 bytes of global memory read", "FFFFF"),
    ("chain", 3, "faults.cu|missing griddep_wait|4 bytes of global memory written", "FFFFF"),
    ("chain", 4, "faults.cu|missing griddep_wait|4 bytes of global memory read", "FFFFF"),
    ("chain", 5, "missing griddep_wait|4 bytes of global memory written", "FFFFF"),
    ("chain", 6, "faults.cu|missing griddep_wait|written, 0 bytes into a 256-byte global buffer", "FFFFF"),
    ("chain", 7, "missing griddep_wait|the thread exits", "FFFFF"),
    ("chain", 8, "missing griddep_wait|the thread exits", "FFFFF"),
];

#[test]
fn every_fault_is_caught() {
    let mut complaints = Vec::new();
    for &(kernel, fault, words, expected) in FAULTS {
        for seed in [1, 2, 3] {
            let mut seen = String::new();
            let mut messages = Vec::new();
            for schedule in Schedule::hostile(seed) {
                let outcome = run(kernel, fault, &schedule);
                seen.push(match &outcome {
                    Outcome::Right => '.',
                    Outcome::Wrong => 'w',
                    Outcome::Caught(text) if words.split('|').all(|w| text.contains(w)) => 'F',
                    Outcome::Caught(_) => 'X',
                });
                messages.push(format!("{outcome:?}"));
            }
            let fits = expected.chars().zip(seen.chars()).all(|(e, s)| e == s || e == '?');
            if !fits || !seen.contains('F') {
                complaints
                    .push(format!("{kernel} {fault}, seed {seed}: {expected}, seen {seen}\n{}", messages.join("\n")));
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n\n"));
}

#[test]
fn launches_are_checked() {
    let refused = |kernel: &str, grid, block, shared, words: usize| {
        start(kernel, grid, block, shared, &vec![0; words], &Schedule::QUICK).unwrap_err().0
    };
    assert!(refused("reduction", 1, 128, 0, 3).contains("unknown kernel"));
    assert!(refused("reduce", 1, 128, 0, 4).contains("wrong parameters: 32 bytes where the kernel's structure has 24"));
    assert!(refused("reduce", 1, 128, (227 << 10) + 1, 3).contains("too much shared memory"));
    assert!(refused("reduce", 1, 1025, 0, 3).contains("a block has 1 to 1024"));
    assert!(refused("reduce", 0, 128, 0, 3).contains("grid"));
}

#[test]
fn blocks_wait_for_each_other_only_if_resident() {
    let flag = Memory::new(4);
    for (resident, fine) in [(4, true), (1, false)] {
        // SAFETY: inside the memory.
        unsafe { (flag.address() as *mut u32).write(0) };
        let schedule = Schedule { resident, ..Schedule::hostile(1)[0] };
        let run = start("relay", 4, 32, 0, &[0, flag.address(), 0], &schedule);
        assert_eq!(run.is_ok(), fine);
        assert!(fine || run.unwrap_err().0.contains("deadlock"));
    }
}

// ---- no false alarms --------------------------------------------------------------------------

/// All orders and landings, with and without race detection.
fn schedules(seed: u64) -> impl Iterator<Item = Schedule> {
    let orders = [Order::Ordered, Order::Random, Order::Priority];
    let landings = [Landing::Eager, Landing::Lazy, Landing::Random];
    orders.into_iter().flat_map(move |order| {
        landings.into_iter().flat_map(move |landing| {
            [false, true].map(|races| Schedule { seed, order, landing, races, ..Schedule::QUICK })
        })
    })
}

#[test]
fn correct_kernels_pass_whatever_the_schedule() {
    for seed in 0..8 {
        for schedule in schedules(seed) {
            for kernel in ["reduce", "exchange", "stream", "narrow", "product", "stored", "pool", "chain"] {
                let outcome = run(kernel, 0, &schedule);
                assert!(matches!(outcome, Outcome::Right), "{kernel} {schedule:?}: {outcome:?}");
            }
        }
    }
}

#[test]
fn every_layout_of_wgmma_multiplies() {
    for swizzle in 0..4 {
        for mn_major in [0, 1] {
            for n in [8, 64, 72, 192, 256].into_iter().filter(|n| mn_major == 0 || n % (8 << swizzle) == 0) {
                for schedule in [Schedule::QUICK, Schedule::hostile(1)[4]] {
                    let outcome = stored((n, swizzle, mn_major), 0, &schedule);
                    assert!(matches!(outcome, Outcome::Right), "{n} {swizzle} {mn_major} {schedule:?}: {outcome:?}");
                }
            }
        }
    }
}

#[test]
fn a_block_does_the_same_on_any_number_of_cores() {
    let x = numbers(1000, 1);
    let input = halves(&x);
    let counted = |threads| {
        let out = Memory::new(128 * 40 * 4);
        let params = [input.address(), out.address(), pair(1000, 0)];
        let bytes: Vec<u8> = params.iter().flat_map(|word| word.to_le_bytes()).collect();
        let schedule = Schedule { threads, ..Schedule::hostile(5)[3] };
        // SAFETY: the parameters are the kernel's.
        let counters = unsafe { launch("reduce", [40, 1, 1], 128, 16, &bytes, &schedule) }.unwrap();
        (counters, floats(&out))
    };
    assert_eq!(counted(1), counted(4));
    assert_eq!(counted(1).0.blocks, 40);
}

#[test]
fn tensor_maps_of_strides_that_no_tensor_has() {
    let memory = Memory::new(1 << 16);
    let map = |strides: &[u64]| {
        TensorMap::tiled(memory.address(), 2, &[40, 2, 5], strides, &[64, 1, 8], 3).map_err(|fault| fault.to_string())
    };
    assert!(map(&[80, 160]).is_ok() && map(&[80, 240]).is_ok());
    // Not a multiple of 16, not a multiple of the stride before, and rows that overlap.
    for strides in [[80, 168], [80, 176], [64, 192], [80, 80]] {
        assert!(map(&strides).unwrap_err().contains("strides"), "{strides:?}");
    }
}
