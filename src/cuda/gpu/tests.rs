//! Tests a GPU against `tests/support/driver.c`, a driver that counts its objects.

#![expect(clippy::undocumented_unsafe_blocks, reason = "the buffers live until the launches that name them have run")]

use super::*;
use bytemuck::NoUninit;
use cudarc::driver::sys;
use rayon::prelude::*;
use std::process::Command;

const fn family(name: &'static str, fatbin: &'static [u8], kernels: &'static [&'static str]) -> Family {
    Family { name, fatbin, kernels }
}

/// The driver accepts the first family; the others are faulty and may not be touched unless one of their kernels is
/// wanted.
static FAMILIES: &[Family] =
    &[family("test", b"image", &["twice"]), family("odd", b"image", &["lost"]), family("newer", b"other", &["thrice"])];
const TILES: TensorTiles =
    TensorTiles { address: 1 << 20, sizes: &[64, 100], strides: &[128], tile: &[64, 32], swizzle: 3 };

/// The environment variable with the words that a test's child process is to see.
const WORDS: &str = "RESPODIFF_TEST_DRIVER_WORDS";

/// Runs a test again for each driver, which is `driver.c` compiled with a flag, and passes the words that belong to it.
/// Each run is a process of its own, since a process has one driver.
fn each_driver(test: &str, drivers: &[(&str, &str)]) -> Option<String> {
    if let Ok(words) = std::env::var(WORDS) {
        return Some(words);
    }
    for (flag, words) in drivers {
        let folder = tempfile::tempdir().unwrap();
        // Under all other names there is a file that no loader accepts, so that no real driver is found.
        for name in cudarc::get_lib_name_candidates("cuda") {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/driver.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-w", flag, source, "-o"]).arg(folder.path().join("libcuda.so"));
        assert!(compiler.status().unwrap().success());
        let name = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", &name, "--nocapture"]).env(WORDS, words).env("LD_LIBRARY_PATH", folder.path());
        let output = child.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "{flag}: {said}");
    }
    None
}

fn gpu() -> Arc<Gpu> {
    let (version, cards) = cards().unwrap();
    Arc::new(Gpu::new(version, cards[0].clone(), FAMILIES).unwrap())
}

/// One of the driver's counters.
fn count(name: &str) -> i32 {
    unsafe { (*sys::culib().get::<unsafe extern "C" fn() -> i32>(name).unwrap())() }
}

/// The number of objects that the driver has handed out and not taken back.
fn live() -> i32 {
    count("live_objects")
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Doubling {
    x: u64,
    out: u64,
    length: u64,
}

fn twice(buffer: &super::super::Buffer, grid: usize) -> Launch {
    let params = Doubling { x: buffer.address(), out: buffer.address(), length: buffer.len() as u64 / 4 };
    Launch::new("twice", [grid, 1, 1], 32, 200 << 10, &params)
}

/// Uploads of several buffers, launches, and graphs that run when replayed and not before; nothing is left behind.
#[test]
fn numbers_go_up_through_and_down() {
    let drivers = [("-O1", "tells"), ("-DVERSION=12000", "")];
    let Some(words) = each_driver("numbers_go_up_through_and_down", &drivers) else { return };
    let gpu = gpu();
    assert_eq!(gpu.limits(), Limits { capability: 90, multiprocessors: 132, shared: 227 << 10 });
    {
        let device: Arc<dyn CudaDevice> = gpu.clone();
        let numbers: Vec<f32> = (0..5_000_001).map(|i| i as f32).collect();
        let buffer = super::super::Buffer::from_bytes(&device, bytemuck::cast_slice(&numbers)).unwrap();
        let factor = || {
            let mut back = vec![0.0f32; numbers.len()];
            buffer.read(0, bytemuck::cast_slice_mut(&mut back)).unwrap();
            let factor = back[1];
            assert!(numbers.iter().zip(&back).all(|(x, y)| x * factor == *y));
            factor
        };
        assert_eq!(factor(), 1.0);
        assert_eq!(device.tensor_map(&TILES).unwrap(), [6, 2, 1 << 20, 64, 100, 128, 64, 32, 1, 1, 0, 3, 3, 0, 0, 0]);
        assert!(device.tensor_map(&TensorTiles { tile: &[64], ..TILES }).is_err());
        assert!(device.tensor_map(&TensorTiles { swizzle: 4, ..TILES }).is_err());
        // The first launch loads its family and no other.
        let before = live();
        unsafe { device.run(&[twice(&buffer, 1)]).unwrap() };
        assert_eq!((live() - before, count("failed_calls")), (1, 0));
        assert_eq!(factor(), 2.0);
        let graph = unsafe { device.clone().record(&[twice(&buffer, 1), twice(&buffer, 1)]).unwrap() };
        assert_eq!(factor(), 2.0);
        graph.replay().unwrap();
        graph.replay().unwrap();
        assert_eq!(factor(), 32.0);
        for (cache, after) in [(Cache::Cold, 64.0), (Cache::Warm, 256.0)] {
            let time = unsafe { device.time(&[twice(&buffer, 1)], cache) }.unwrap();
            assert_eq!((time, factor()), (Duration::from_micros(1500), after), "{cache:?}");
        }
        // A module, a recording, and two events and memory for timing; no call has failed.
        let expected = (5, 0);
        assert_eq!((live() - before, count("failed_calls")), expected);
        // A structure of another size than the kernel's, where the driver tells sizes.
        let longer = Launch { params: [0; 32].into(), ..twice(&buffer, 1) };
        match unsafe { device.clone().record(&[longer]) } {
            Ok(_) => assert!(words.is_empty()),
            Err(refused) => assert!(refused.to_string().contains("takes 24 bytes of parameters and was given 32")),
        }
        // A launch that is refused leaves neither a partial graph nor a stream in capture.
        let refused = unsafe { device.clone().record(&[twice(&buffer, 1), twice(&buffer, 0)]) }.err().unwrap();
        assert!(refused.to_string().contains("launching `twice` (grid [0, 1, 1]"), "{refused}");
        unsafe { device.clone().record(&[twice(&buffer, 1)]).unwrap() }.replay().unwrap();
        assert_eq!(factor(), 512.0);
        // Copies two numbers onto others within the device.
        unsafe { device.copy(buffer.address(), buffer.address() + 8, 8).unwrap() };
        let mut back = [0.0f32; 3];
        buffer.read(0, bytemuck::cast_slice_mut(&mut back)).unwrap();
        assert_eq!(back, [1024.0, 1536.0, 1024.0]);
    }
    drop(gpu);
    assert_eq!(live(), 0);
}

/// All launches of a list except the first begin early, run or recorded, where the kernels wait by themselves and
/// graphs have programmatic edges.
#[test]
fn launches_overlap_on_9_0_alone() {
    let drivers = [
        ("-O1", "2 1"),
        ("-DVERSION=12030", "2 1"),
        ("-DVERSION=12020", "0 0"),
        ("-DCAPABILITY=89", "0 0"),
        ("-DCAPABILITY=100", "0 0"),
    ];
    let Some(words) = each_driver("launches_overlap_on_9_0_alone", &drivers) else { return };
    let gpu = gpu();
    {
        let device: Arc<dyn CudaDevice> = gpu.clone();
        let buffer = super::super::Buffer::zeroed(&device, 64).unwrap();
        let launches: [Launch; 3] = std::array::from_fn(|_| twice(&buffer, 1));
        unsafe { device.run(&launches).unwrap() };
        let run = count("early_launches");
        unsafe { device.clone().record(&launches[..2]).unwrap() };
        assert_eq!(format!("{run} {}", count("early_launches") - run), words);
        assert_eq!(count("failed_calls"), 0);
    }
    drop(gpu);
    assert_eq!(live(), 0);
}

#[test]
fn a_driver_that_does_not_start_says_why_in_one_line() {
    let drivers = [
        ("-c", "no NVIDIA driver (libcuda) found; install it"),
        ("-DcuDriverGetVersion=other", "libcuda is not NVIDIA's driver"),
        ("-DVERSION=11040", "(CUDA 11.4) is older than CUDA 12.0"),
        ("-DNO_CAPTURE", "(CUDA 12.4) lacks cuStreamBeginCapture_v2"),
        ("-DINIT=100", "finds no GPU"),
        ("-DINIT=34", "CUDA_ERROR_OF_TEST (test); this libcuda is a toolkit's stub"),
        ("-DINIT=803", "CUDA_ERROR_OF_TEST (test); driver and kernel module"),
        ("-DINIT=999", "does not start: error 999"),
    ];
    let Some(words) = each_driver("a_driver_that_does_not_start_says_why_in_one_line", &drivers) else { return };
    let problem = cards().err().unwrap().to_string();
    assert!(problem.contains(&words), "{problem}");
    assert!(problem.contains("choose the CPU") && !problem.contains('\n'), "{problem}");
}

#[test]
fn trouble_leaves_nothing_behind() {
    let Some(_) = each_driver("trouble_leaves_nothing_behind", &[("-DCAPABILITY=75", "")]) else { return };
    let (version, cards) = cards().unwrap();
    let card = &cards[0];
    assert!(!card.usable());
    assert_eq!(card.to_string(), "Test GPU (7.5)");
    let gpu = Arc::new(Gpu::new(version, card.clone(), FAMILIES).unwrap());
    for (kernel, words) in [
        ("thrice", &["`newer` cannot be loaded", "build with nvcc 12.4"][..]),
        ("lost", &["looking for kernel `lost`"]),
        ("never", &["no kernel `never`"]),
    ] {
        let problem = unsafe { gpu.run(&[Launch::new(kernel, [1, 1, 1], 32, 0, &0u64)]) }.err().unwrap().to_string();
        assert!(words.iter().all(|words| problem.contains(words)), "{problem}");
    }
    let problem = gpu.allocate(1 << 30).err().unwrap().to_string();
    assert!(problem.contains("1.00 GiB of memory are wanted where 0.06 GiB are free"), "{problem}");
    drop(gpu);
    assert_eq!(live(), 0);
}

/// Threads that upload at the same time, and help each other meanwhile, each have a pinned buffer of their own.
#[test]
fn threads_upload_side_by_side() {
    let Some(_) = each_driver("threads_upload_side_by_side", &[("-O1", "")]) else { return };
    let gpu = gpu();
    {
        let device: Arc<dyn CudaDevice> = gpu.clone();
        let check = |seed: usize| {
            let bytes: Vec<u8> = (0..2 * staging::BUFFER + 12345).map(|i| (i * (2 * seed + 1) / 8) as u8).collect();
            let buffer = super::super::Buffer::from_bytes(&device, &bytes).unwrap();
            let mut back = vec![0; bytes.len()];
            buffer.read(0, &mut back).unwrap();
            assert!(back == bytes, "upload {seed}");
        };
        (0..16).into_par_iter().for_each(check);
        assert_eq!(count("failed_calls"), 0);
    }
    drop(gpu);
    assert_eq!(live(), 0);
}

#[test]
fn a_gpu_that_another_process_holds_is_said_to_be_held() {
    let drivers = [("-DRETAIN=46", "is held by another process"), ("-DRETAIN=2", "has no memory left beside")];
    let Some(words) = each_driver("a_gpu_that_another_process_holds_is_said_to_be_held", &drivers) else { return };
    let (version, cards) = cards().unwrap();
    let problem = Gpu::new(version, cards[0].clone(), FAMILIES).err().unwrap().to_string();
    assert!(problem.contains(&format!("Test GPU (9.0) {words}")) && !problem.contains('\n'), "{problem}");
    assert_eq!(live(), 0);
}

/// The machine code that each GPU runs, from all that a build may have.
#[test]
fn every_gpu_runs_the_newest_code_that_it_can() {
    let all = ["80", "86", "89", "90a", "100", "120"];
    for (capability, form) in [
        (75, "none: compute"),
        (80, "sm_80 "),
        (86, "sm_86 "),
        (87, "sm_86 "),
        (89, "sm_89 "),
        (90, "sm_90a "),
        (100, "sm_100 "),
        (103, "sm_100 "),
        (110, "PTX"),
        (120, "sm_120 "),
        (121, "sm_120 "),
    ] {
        let code = code(capability, all.into_iter());
        assert!(code.starts_with(form), "{capability}: {code}");
    }
    assert!(code(89, ["80", "90a"].into_iter()).starts_with("sm_80 "));
    assert!(code(86, ["89"].into_iter()).starts_with("PTX"));
}
