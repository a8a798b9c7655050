//! Tests that the kernels' machine code contains the instructions that make them fast. This needs the nvcc that the
//! build found, and cuobjdump beside it; without them, nothing is tested.

use respodiff::cuda::compiled::FAMILIES;
use std::path::Path;
use std::process::Command;

/// Kernels by name (`*` is any text), architectures (all if none is named), and instructions that their code must
/// contain.
const REQUIRED: &[(&str, &str, &[&str])] = &[
    // Tensor cores are fed by ldmatrix, and shared memory is filled sixteen bytes at a time, bypassing L1.
    ("conv_*x*", "", &["HMMA.16816.F32", "LDSM.16.M", "LDGSTS.E.BYPASS.128"]),
    ("conv_hopper_*", "sm_90a", &["HGMMA.64x", "UTMALDG.4D", "UTMASTG.4D", "STSM.16.M", "USETMAXREG"]),
    ("conv_hopper_160", "sm_90a", &["UTMALDG.2D"]),
    ("conv_hopper_*_gated", "sm_90a", &["UTMALDG.3D"]),
    ("attention_*64", "", &["HMMA.16816.F32", "LDSM.16.M", "LDGSTS.E.BYPASS.128"]),
    ("attention_*128", "", &["HMMA.16816.F32", "LDSM.16.M", "LDGSTS.E.BYPASS.128"]),
    ("attention_hopper_*", "sm_90a", &["HGMMA.64x", "UTMALDG.4D", "UTMASTG.4D", "MUFU.EX2"]),
    ("attention_hopper_*_*", "sm_90a", &["USETMAXREG"]),
    ("attention_hopper_512", "sm_90a", &["HGMMA.64x64x16.F32", "HGMMA.64x256x16.F32", "STSM.16.M"]),
    ("attention_gradient_hopper_*", "sm_90a", &["HGMMA.64x", "UTMALDG.4D", "UTMASTG.4D", "MUFU.EX2", "USETMAXREG"]),
    ("attention_gradient_hopper_*_by_key", "sm_90a", &["UTMALDG.3D"]),
    ("attention_gradient_*0", "", &["HMMA.16816.F32", "LDSM.16.M", "LDGSTS.E.BYPASS.128"]),
    // Sixteen bytes per load and store.
    ("group_norm*_8", "", &["LDG.E.128"]),
    ("layer_norm*_8", "", &["LDG.E.128"]),
    ("activate*", "", &["LDG.E.128", "STG.E.128"]),
    ("add", "", &["LDG.E.128", "STG.E.128"]),
    ("mean_of_halves_8", "", &["LDG.E.128", "STG.E.128"]),
    ("geglu*_8", "", &["LDG.E.128", "STG.E.128"]),
    ("resize_gradient_8", "", &["LDG.E.128", "STG.E.128"]),
    ("conformance_cp_async16*", "", &["LDGSTS.E.BYPASS.128"]),
    ("conformance_ldmatrix*", "", &["LDSM.16.M"]),
    ("conformance_mma*", "", &["HMMA.16816.F32"]),
    ("conformance_exp2_approx*", "", &["MUFU.EX2"]),
    ("conformance_rcp_approx*", "", &["MUFU.RCP"]),
    ("conformance_to_half*", "", &["F2FP.SATFINITE"]),
    ("conformance_stmatrix*", "sm_90a", &["STSM.16.M"]),
    ("conformance_mbarriers*", "sm_90a", &["SYNCS.PHASECHK.TRANS64.TRYWAIT"]),
    ("conformance_tma_load*", "sm_90a", &["UTMALDG"]),
    ("conformance_tma_store*", "sm_90a", &["UTMASTG"]),
    ("conformance_griddep", "sm_90a", &["PREEXIT", "ACQBULK"]),
    ("conformance_setmaxnreg*", "sm_90a", &["USETMAXREG"]),
    // One instruction covers the whole width.
    ("conformance_wgmma_m64n32*", "sm_90a", &["HGMMA.64x32x16.F32"]),
    ("conformance_wgmma_m64n40*", "sm_90a", &["HGMMA.64x40x16.F32"]),
    ("conformance_wgmma_m64n64*", "sm_90a", &["HGMMA.64x64x16.F32"]),
    ("conformance_wgmma_m64n80*", "sm_90a", &["HGMMA.64x80x16.F32"]),
    ("conformance_wgmma_m64n128*", "sm_90a", &["HGMMA.64x128x16.F32"]),
    ("conformance_wgmma_m64n160*", "sm_90a", &["HGMMA.64x160x16.F32"]),
    ("conformance_wgmma_m64n256*", "sm_90a", &["HGMMA.64x256x16.F32"]),
];

/// Instructions that a kernel's code must not contain: the sampler does the arithmetic of the CPU, which does not fuse
/// multiplications and additions.
const FORBIDDEN: &[(&str, &str)] = &[("guide_and_step", "FFMA"), ("prepare", "FFMA")];

/// Instructions that no kernel of compute capability 9.0 may execute before it has waited for the preceding launches:
/// they read or write global memory or end the thread. TMA loads are permitted, since they may fetch weights.
const TOO_EARLY: &[&str] = &["LDG", "STG", "ATOM", "RED", "UTMASTG", "EXIT"];

/// Kernels that load weights by LDG before they wait. The emulator finds loads of anything that launches write.
const EARLY_WEIGHTS: &[&str] = &["group_norm_apply_*", "group_norm_8", "group_norm_1"];

/// Every function of a fatbin: architecture, name, code.
fn functions(cuobjdump: &Path, fatbin: &[u8]) -> Vec<(String, String, String)> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kernels.fatbin");
    std::fs::write(&file, fatbin).unwrap();
    // cuobjdump runs nvdisasm, which is in the same folder.
    let mut path = vec![cuobjdump.parent().unwrap().to_path_buf()];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let path = std::env::join_paths(path).unwrap();
    let output = Command::new(cuobjdump).env("PATH", path).arg("--dump-sass").arg(&file).output().unwrap();
    assert!(output.status.success(), "cuobjdump: {}", String::from_utf8_lossy(&output.stderr));
    let mut architecture = String::new();
    let mut functions: Vec<(String, String, String)> = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if let Some(name) = line.trim().strip_prefix("arch = ") {
            architecture = name.to_string();
        } else if let Some(name) = line.trim().strip_prefix("Function : ") {
            functions.push((architecture.clone(), name.to_string(), String::new()));
        } else if let Some((_, _, code)) = functions.last_mut() {
            code.push_str(line);
            code.push('\n');
        }
    }
    functions
}

/// True if a name matches a pattern, in which `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => name == pattern,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|tail| {
            tail.char_indices().map(|(i, _)| i).chain([tail.len()]).any(|i| matches(rest, &tail[i..]))
        }),
    }
}

#[test]
fn fast_instructions_are_there() {
    let nvcc = option_env!("RESPODIFF_NVCC").map(Path::new);
    let Some(cuobjdump) = nvcc.map(|nvcc| nvcc.with_file_name("cuobjdump")).filter(|program| program.is_file()) else {
        eprintln!("no cuobjdump: the kernels' machine code was not tested");
        return;
    };
    let functions: Vec<_> = FAMILIES.iter().flat_map(|family| functions(&cuobjdump, family.fatbin)).collect();
    for (pattern, only, mnemonics) in REQUIRED {
        let meant = |(architecture, name, _): &&(String, String, String)| {
            (only.is_empty() || only == architecture) && matches(pattern, name)
        };
        let kernels: Vec<_> = functions.iter().filter(meant).collect();
        assert!(!kernels.is_empty(), "no kernel {pattern} for {only} was compiled");
        for (architecture, name, code) in kernels {
            for mnemonic in *mnemonics {
                assert!(code.contains(mnemonic), "{name}: no {mnemonic} in its code for {architecture}");
            }
        }
    }
    let waits = |(architecture, name, _): &&(String, String, String)| {
        architecture == "sm_90a" && !name.starts_with("conformance_")
    };
    for (_, name, code) in functions.iter().filter(waits) {
        assert!(code.contains("PREEXIT"), "{name} does not let the next launch begin");
        let (before, _) = code.split_once("ACQBULK").unwrap_or_else(|| panic!("{name} does not wait"));
        let weights = EARLY_WEIGHTS.iter().any(|pattern| matches(pattern, name));
        let refused =
            |word: &str| TOO_EARLY.iter().any(|early| word.starts_with(early) && !(weights && *early == "LDG"));
        let early = before.split_whitespace().find(|word| refused(word));
        assert!(early.is_none(), "{name}: {} before it waits", early.unwrap());
    }
    for (kernel, mnemonic) in FORBIDDEN {
        let kernels = functions.iter().filter(|(_, name, _)| name == kernel);
        let holding: Vec<_> = kernels.map(|(architecture, _, code)| (architecture, code.contains(mnemonic))).collect();
        assert!(!holding.is_empty(), "no kernel {kernel} was compiled");
        assert!(holding.iter().all(|(_, holds)| !holds), "{kernel}: {mnemonic} in its code: {holding:?}");
    }
}
