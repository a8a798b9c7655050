//! Helpers that the tests share: golden cases, layouts, errors.

#![allow(dead_code)] // each test binary uses its own part

use half::f16;
use respodiff::backend::Precision;
use respodiff::concept::{Form, Module};
use respodiff::graph::{Graph, Shape, WeightKind};
use respodiff::weights::Tensors;
use respodiff::{Device, cuda};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// The folder of the repository, or that which cargo's variable names at run time, since test binaries also run on
/// machines without the repository.
pub fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// The golden folder.
pub fn golden() -> PathBuf {
    root().join("tests/golden")
}

/// A copy of a golden checkpoint to change.
pub fn copy(checkpoint: &str) -> tempfile::TempDir {
    copies(&[checkpoint])
}

/// A copy of a golden checkpoint over another one.
pub fn copies(checkpoints: &[&str]) -> tempfile::TempDir {
    fn tree(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap().map(|e| e.unwrap()) {
            let to = to.join(entry.file_name());
            if entry.path().is_dir() {
                tree(&entry.path(), &to);
            } else {
                std::fs::copy(entry.path(), to).unwrap();
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    for checkpoint in checkpoints {
        tree(&golden().join("checkpoints").join(checkpoint), folder.path());
    }
    folder
}

/// The GPU, if RESPODIFF_TEST_DEVICE=cuda says that kernels are to be tested there.
pub fn gpu() -> Option<Arc<dyn cuda::CudaDevice>> {
    static GPU: OnceLock<Arc<dyn cuda::CudaDevice>> = OnceLock::new();
    let asked = std::env::var("RESPODIFF_TEST_DEVICE").is_ok_and(|device| device == "cuda");
    asked.then(|| GPU.get_or_init(|| cuda::open(None).unwrap_or_else(|problem| panic!("{problem}"))).clone())
}

/// The device on which the CUDA kernels are tested: the emulator with its fastest schedule, or the GPU.
#[cfg(feature = "emulated")]
pub fn kernels() -> Device {
    Device::kernels(gpu().unwrap_or_else(|| cuda::Emulated::new(cuda::Limits::A100, cuda::Emulated::QUICK)))
}

/// One recorded file.
pub struct Case {
    pub name: String,
    bytes: Vec<u8>,
}

/// All cases whose name starts with `prefix`; at least `least`, so that a test cannot pass by finding none.
pub fn cases(prefix: &str, least: usize) -> Vec<Case> {
    let folder = golden().join("cases");
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .expect("tests/golden/cases")
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter_map(|n| Some(n.strip_suffix(".safetensors")?.to_string()))
        .filter(|n| n.starts_with(prefix))
        .collect();
    names.sort();
    assert!(names.len() >= least, "only {} cases {prefix}*", names.len());
    let read = |name: String| Case { bytes: std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap(), name };
    names.into_iter().map(read).collect()
}

impl Case {
    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("a safetensors file")
    }
    pub fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors().tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name)).shape().to_vec()
    }
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let view = self.tensors().tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name));
        assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
    pub fn integers(&self, name: &str) -> Vec<i64> {
        let view = self.tensors().tensor(name).expect(name);
        assert_eq!(view.dtype(), safetensors::Dtype::I64, "{name}");
        view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    }
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let view = self.tensors().tensor(name).expect(name);
        assert_eq!(view.dtype(), safetensors::Dtype::U8, "{name}");
        view.data().to_vec()
    }
    /// The bytes of a tensor of any format.
    pub fn raw(&self, name: &str) -> Vec<u8> {
        self.tensors().tensor(name).expect(name).data().to_vec()
    }
    pub fn metadata(&self) -> HashMap<String, String> {
        SafeTensors::read_metadata(&self.bytes).expect("header").1.metadata().clone().unwrap_or_default()
    }
}

/// PyTorch's median and worst error in fp16, which `tests/golden/half.py` recorded.
pub fn half_errors(case: &Case, output: &str) -> (f64, f64) {
    let text = std::fs::read_to_string(golden().join("cases/half.json")).expect("half.json");
    let errors: serde_json::Value = serde_json::from_str(&text).expect("half.json");
    let error = |which| {
        let value = errors[&case.name][output][which].as_f64();
        value.unwrap_or_else(|| panic!("half.json has no {} {output} {which}", case.name))
    };
    (error("median"), error("worst"))
}

/// Runs a graph, and returns all of its outputs, NHWC.
pub fn run(
    device: &Device,
    graph: Graph,
    tensors: &Tensors,
    inputs: &HashMap<&str, Vec<f32>>,
) -> HashMap<String, Vec<f32>> {
    run_all(device, graph, tensors, std::slice::from_ref(inputs)).remove(0)
}

/// Runs a graph on each set of inputs, with one executor, and returns all outputs of each, NHWC.
pub fn run_all(
    device: &Device,
    graph: Graph,
    tensors: &Tensors,
    calls: &[HashMap<&str, Vec<f32>>],
) -> Vec<HashMap<String, Vec<f32>>> {
    let names = ["last_hidden_state", "penultimate_hidden_state", "text_embeds", "sample", "mid", "image", "moments"];
    let outputs: Vec<&str> = names.into_iter().filter(|n| graph.find_output(n).is_some()).collect();
    let plan = device.plan(graph, &["encoder_hidden_states", "text_embeds", "time_ids"]);
    let weights = device.weights(plan.graph().weights(), tensors, &[], Precision::Full).expect("weights");
    let mut executor = device.executor(plan, &weights).expect("an executor");
    let call = |inputs: &HashMap<&str, Vec<f32>>| {
        for (name, values) in inputs {
            if executor.plan().graph().find_input(name).is_some() {
                executor.write(name, values).expect("an input");
            }
        }
        executor.prologue().and_then(|()| executor.step()).unwrap_or_else(|error| panic!("{error}"));
        outputs.iter().map(|&name| (name.to_string(), executor.read(name).expect("an output"))).collect()
    };
    calls.iter().map(call).collect()
}

/// `||a - b|| / ||b||`.
pub fn relative_l2(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| (*a as f64) - (*b as f64)));
    difference / norm(&mut b.iter().map(|b| *b as f64))
}

/// `[n, c, pixels]` to `[n, pixels, c]`.
pub fn nchw_to_nhwc(x: &[f32], n: usize, c: usize) -> Vec<f32> {
    transpose(x, n, c, x.len() / n / c)
}

/// `[n, pixels, c]` to `[n, c, pixels]`.
pub fn nhwc_to_nchw(x: &[f32], n: usize, c: usize) -> Vec<f32> {
    transpose(x, n, x.len() / n / c, c)
}

fn transpose(x: &[f32], n: usize, rows: usize, columns: usize) -> Vec<f32> {
    assert_eq!(x.len(), n * rows * columns);
    let at = |i: usize| {
        let (image, rest) = (i / (rows * columns), i % (rows * columns));
        x[(image * rows + rest % rows) * columns + rest / rows]
    };
    (0..x.len()).map(at).collect()
}

/// Numbers in float64, in which plain loops compute.
pub type Numbers = Vec<f64>;

/// Seeded numbers in -1..1.
pub fn random(len: usize, seed: u64) -> Numbers {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

pub fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// Writes random weights for a graph as the UNet of a checkpoint, so that packing is tested as well. Returns the
/// checkpoint's folder and the weights by name, rounded to the given format (fp16 or fp32).
pub fn weights(graph: &Graph, format: Dtype) -> (tempfile::TempDir, HashMap<String, Numbers>) {
    let folder = tempfile::tempdir().unwrap();
    let mut by_name = HashMap::new();
    let mut tensors = Vec::new();
    for spec in graph.weights() {
        for (name, &outputs) in spec.names.iter().zip(&spec.outputs) {
            let numbers = random(outputs * spec.width, 77 + name.len() as u64 * 13 + outputs as u64);
            let (bytes, numbers): (Vec<Vec<u8>>, Numbers) = match format {
                Dtype::F16 => {
                    numbers.iter().map(|&x| f16::from_f64(x)).map(|x| (x.to_le_bytes().to_vec(), x.to_f64())).unzip()
                }
                _ => numbers.iter().map(|&x| x as f32).map(|x| (x.to_le_bytes().to_vec(), x as f64)).unzip(),
            };
            if by_name.insert(name.clone(), numbers).is_none() {
                let shape = match spec.kind {
                    WeightKind::Matrix { kernel, inputs, .. } | WeightKind::Mirrored { kernel, inputs, .. } => {
                        vec![outputs, inputs, kernel, kernel]
                    }
                    _ => vec![outputs],
                };
                tensors.push((name.clone(), shape, bytes.concat()));
            }
        }
    }
    let views = tensors.iter().map(|(n, s, b)| (n, TensorView::new(format, s.clone(), b).unwrap()));
    std::fs::create_dir(folder.path().join("unet")).unwrap();
    std::fs::write(folder.path().join("unet/config.json"), "{}").unwrap();
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("unet/diffusion_pytorch_model.safetensors"), bytes).unwrap();
    (folder, by_name)
}

/// A concept's module whose numbers all differ.
pub fn module(form: Form, shape: Shape, seed: u32) -> Module {
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut module = Module::new(form, shape, &mut draw);
    module.parameters.iter_mut().for_each(|p| *p += 0.4 * draw());
    module
}

/// A file of `torch.save` with these tensors, given as name, shape, format and bytes: a state dict, or a checkpoint of
/// a trainer with one. It has the instructions that torch writes, without those that only save space.
pub fn torch_save(tensors: &[(String, Vec<usize>, Dtype, Vec<u8>)], wrapped: bool) -> Vec<u8> {
    use std::io::Write;
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let int = |n: usize| [b"J", &(n as u32).to_le_bytes()[..]].concat();
    let tuple = |items: Vec<Vec<u8>>| [b"(".to_vec(), items.concat(), b"t".to_vec()].concat();
    let mut pickle = b"\x80\x02}(".to_vec();
    if wrapped {
        pickle.extend([text("epoch"), int(3), text("state_dict"), b"}(".to_vec()].concat());
    }
    for (i, (name, shape, dtype, bytes)) in tensors.iter().enumerate() {
        let class: &[u8] = match dtype {
            Dtype::F16 => b"ctorch\nHalfStorage\n",
            Dtype::F32 => b"ctorch\nFloatStorage\n",
            _ => b"ctorch\nLongStorage\n",
        };
        let numbers = bytes.len() / (dtype.bitsize() / 8);
        let storage = tuple(vec![text("storage"), class.to_vec(), text(&i.to_string()), text("cpu"), int(numbers)]);
        let strides = (0..shape.len()).map(|axis| int(shape[axis + 1..].iter().product())).collect();
        let sizes = tuple(shape.iter().map(|&size| int(size)).collect());
        let hooks = b"\x89ccollections\nOrderedDict\n)R".to_vec();
        let arguments = [storage, b"QK\0".to_vec(), sizes, tuple(strides), hooks];
        pickle
            .extend([text(name), b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(), tuple(arguments.to_vec())].concat());
        pickle.push(b'R');
    }
    pickle.extend(if wrapped { &b"uu."[..] } else { b"u." });
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut member = |name: &str, bytes: &[u8]| {
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    };
    member("archive/data.pkl", &pickle);
    member("archive/byteorder", b"little");
    for (i, (.., bytes)) in tensors.iter().enumerate() {
        member(&format!("archive/data/{i}"), bytes);
    }
    archive.finish().unwrap().into_inner()
}
