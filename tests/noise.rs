//! Noise compared with torch's, and with that of A1111's Philox generator.

use std::path::Path;

use respodiff::diffusion::brownian::BrownianTree;
use respodiff::diffusion::noise::{NormalGenerator, Rng};
use safetensors::SafeTensors;

fn draw(generator: &mut NormalGenerator, len: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; len];
    generator.fill(&mut out);
    out
}

/// Compares with a tolerance, since torch's logarithm and cosine are vectorised and differ from the standard library's
/// in the last bits.
fn assert_close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= 1e-6, "{what}: element {i} is {a}, not {b}");
    }
}

#[test]
fn torch_cpu() {
    let draw = |seed, len| draw(&mut NormalGenerator::new(Rng::TorchCpu, seed), len);
    let sixteen = [
        -1.1258398, -1.1523602, -0.2505786, -0.4338788, 0.8487103, 0.6920092, -0.3160128, -2.1152194, 0.3222749,
        -1.2633348, 0.3499832, 0.3081339, 0.1198415, 1.237658, 1.1167772, -0.2472782,
    ];
    assert_close(&draw(0, 16), &sixteen, "randn(16)");
    assert_close(&draw(0, 3), &[1.5409961, -0.2934289, -2.1787894], "randn(3)");
    // Only the low half of the seed counts.
    assert_eq!(draw(7, 20), draw(7 + (1 << 32), 20));
    assert!(draw(0, 0).is_empty());
}

#[test]
fn torch_cpu_as_recorded() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases/rng.safetensors");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let recorded = SafeTensors::deserialize(&bytes).unwrap();
    let mut draws = 0;
    for (name, tensor) in recorded.iter() {
        // "out.<seed>.<length>+<length>...": draws one after the other from one generator.
        let (seed, lengths) = name.strip_prefix("out.").unwrap().split_once('.').unwrap();
        let mut generator = NormalGenerator::new(Rng::TorchCpu, seed.parse().unwrap());
        let ours: Vec<f32> = lengths.split('+').flat_map(|len| draw(&mut generator, len.parse().unwrap())).collect();
        let floats = tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        assert_close(&ours, &floats.collect::<Vec<f32>>(), name);
        draws += 1;
    }
    assert!(draws > 10, "only {draws} draws recorded");
}

/// The Brownian motion of k-diffusion's stochastic samplers, against torchsde's.
#[test]
fn brownian_motion() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases/brownian.safetensors");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let spans: serde_json::Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["spans"]).unwrap();
    let recorded = SafeTensors::deserialize(&bytes).unwrap();
    let mut compared = 0;
    for (name, tensor) in recorded.iter() {
        let (list, seed) = name.strip_prefix("out.").unwrap().split_once('.').unwrap();
        let spans: Vec<[f64; 2]> = serde_json::from_value(spans[list].clone()).unwrap();
        let greatest = spans.iter().map(|span| span[0]).fold(0.0, f64::max);
        let least = spans.iter().map(|span| span[1]).fold(greatest, f64::min);
        let len = tensor.shape()[1..].iter().product();
        let mut tree = BrownianTree::new(Rng::TorchCpu, seed.parse().unwrap(), least, greatest, len);
        let theirs: Vec<f32> =
            tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        // In another order too: values depend neither on it nor on each other.
        for order in [(0..spans.len()).collect::<Vec<_>>(), (0..spans.len()).rev().collect()] {
            for i in order {
                let mut ours = vec![f32::NAN; len];
                tree.fill(spans[i][0], spans[i][1], &mut ours);
                for (a, b) in ours.iter().zip(&theirs[i * len..][..len]) {
                    // torchsde adds fp32 numbers, and near the end divides small differences by small roots.
                    assert!((a - b).abs() <= 3e-5, "{name}, span {i}: {a} is not {b}");
                }
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 2 * 4 * (7 + 2));
    // Another generator gives other noise, of the same kind.
    let mut ours = vec![0.0; 4096];
    BrownianTree::new(Rng::TorchCuda, 3, 0.03, 14.6, ours.len()).fill(3.0, 2.5, &mut ours);
    let variance = ours.iter().map(|x| (x * x) as f64).sum::<f64>() / ours.len() as f64;
    assert!((variance - 1.0).abs() < 0.1, "{variance}");
}

#[test]
fn torch_cpu_continues_its_sequence() {
    // The ends of draws of these lengths with torch and seed 1234. Short draws leave a spare number, which is kept
    // during long draws.
    let mut generator = NormalGenerator::new(Rng::TorchCpu, 1234);
    for (len, tail) in [
        (3, vec![0.0461305, 0.4024028, -1.0115291]),
        (3, vec![0.2167382, -0.6122731, 0.5036107]),
        (16, vec![-1.0988696, -0.1706135, -1.4594387, 0.2206591, 0.2462521]),
        (5, vec![-0.1319204, 0.8848398, -0.2610768, 0.6104171, -0.0098423]),
        (37, vec![0.8518731, -1.4101809, -0.1071021, -0.8018113, 0.2770742]),
        (1, vec![-1.4473404]),
    ] {
        let out = draw(&mut generator, len);
        assert_close(&out[len - tail.len()..], &tail, &format!("draw of {len}"));
    }
    // The latents of a picture of 512 by 512 pixels, and those of the next one.
    let mut generator = NormalGenerator::new(Rng::TorchCpu, 42);
    let latent = draw(&mut generator, 4 * 64 * 64);
    assert_close(&latent[latent.len() - 4..], &[-0.8111438, -0.6357505, 0.9728097, -0.2934061], "first latent");
    let sum: f64 = latent.iter().map(|value| *value as f64).sum();
    assert!((sum - 149.76480043913034).abs() < 1e-2, "{sum}");
    let latent = draw(&mut generator, 4 * 64 * 64);
    assert_close(&latent[..4], &[-1.3046587, 1.4507034, 0.24428, -0.2798896], "second latent");
}

#[test]
fn torch_cuda() {
    let mut generator = NormalGenerator::new(Rng::TorchCuda, 0);
    let first = draw(&mut generator, 12);
    let expected = [
        -0.9246624, -0.4253439, -2.6438458, 0.1451839, -0.1208666, -0.5797257, -0.6228516, -0.3283871, -1.0745417,
        -0.363144, -1.6710502, 2.2655048,
    ];
    assert_close(&first, &expected, "first draw");
    // A draw depends on the number of draws before it, not on their lengths.
    let second = draw(&mut generator, 12);
    let mut other = NormalGenerator::new(Rng::TorchCuda, 0);
    assert_eq!(draw(&mut other, 5), first[..5]);
    assert_eq!(draw(&mut other, 5), second[..5]);
    assert_ne!(first, second);
    // Both halves of the seed count.
    assert_ne!(draw(&mut NormalGenerator::new(Rng::TorchCuda, 1 << 32), 12), first);
}

#[test]
fn both_are_standard_normal() {
    for rng in Rng::ALL {
        let values = draw(&mut NormalGenerator::new(rng, 3), 100_000);
        let moment = |power: i32| values.iter().map(|v| (*v as f64).powi(power)).sum::<f64>() / values.len() as f64;
        for (power, expected) in [(1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)] {
            assert!((moment(power) - expected).abs() < 0.1, "{rng:?}: moment {power} is {}", moment(power));
        }
    }
}

#[test]
fn generators_go_by_name() {
    for rng in Rng::ALL {
        assert_eq!(rng.name().parse::<Rng>().unwrap(), rng);
    }
    assert_eq!("Torch-CUDA".parse::<Rng>().unwrap(), Rng::TorchCuda);
    let message = "nv".parse::<Rng>().expect_err("refused").to_string();
    assert!(message.contains("torch-cpu") && message.contains("torch-cuda"), "{message}");
}
