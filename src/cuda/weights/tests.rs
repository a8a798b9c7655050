use super::super::{Emulated, Limits};
use super::packing::{phases_bytes, sums_bytes};
use super::*;
use crate::graph::WeightKind;
use crate::weights::cases::{Case, Random};
use respodiff_emulated_kernels::Schedule;

/// The packed form by definition: puts every number at its index.
fn packed_by_definition(case: &Case) -> Vec<u8> {
    let (spec, outputs) = (&case.spec, case.spec.total_outputs());
    if spec.kind == WeightKind::Vector {
        return case.numbers().flat_map(|(_, x)| x.to_le_bytes()).collect();
    }
    let norm: Option<Vec<f32>> = case.norm.as_ref().map(|norm| norm.numbers().map(|(_, x)| x).collect());
    let mut halves = vec![f16::ZERO; packed_bytes(spec) / size_of::<f16>()];
    for ([output, input, tap], x) in case.numbers() {
        let x = x * norm.as_ref().map_or(1.0, |norm| norm[input]);
        let place = match spec.kind {
            WeightKind::Vector | WeightKind::Table => output * spec.width + input,
            WeightKind::Matrix { kernel, inputs, gated, .. } => {
                let row = match gated {
                    false => output,
                    true => output % (outputs / 2) * 2 + output / (outputs / 2),
                };
                (row * kernel * kernel + tap) * inputs.next_multiple_of(CHUNK) + input
            }
            WeightKind::Mirrored { wanted, .. } if input >= wanted => continue,
            WeightKind::Mirrored { kernel, .. } => {
                let taps = kernel * kernel;
                (input * taps + taps - 1 - tap) * outputs.next_multiple_of(CHUNK) + output
            }
        };
        halves[place] = f16::from_f32(x.clamp(-65504.0, 65504.0));
    }
    bytemuck::cast_slice(&halves).to_vec()
}

fn load(device: &Arc<dyn CudaDevice>, cases: &[Case], limit: usize) -> Result<Vec<Vec<u8>>> {
    let loading = cases.iter().map(|case| Loading {
        spec: &case.spec,
        parts: case.stored(),
        norm: case.norm.as_ref().map(|norm| (&norm.spec, norm.stored())),
    });
    let weights: Vec<_> = loading.collect();
    let own = Buffer::zeroed(device, cases.iter().map(|case| padded_bytes(&case.spec)).sum())?;
    let read = |(case, offset): (&Case, usize)| {
        let second = phases_bytes(&case.spec) + sums_bytes(&case.spec);
        let mut bytes = vec![0; if second > 0 { behind(&case.spec) + second } else { packed_bytes(&case.spec) }];
        own.read(offset, &mut bytes).map(|()| bytes)
    };
    cases.iter().zip(upload(device, &own, &weights, limit)?).map(read).collect()
}

/// Compares S and T with sums in float64, S over the packed numbers and T over the file's.
fn assert_sums(case: &Case, packed: &[u8], sums: &[u8]) {
    let numbers = |norm: &Case| norm.numbers().map(|(_, x)| f64::from(x)).collect::<Vec<_>>();
    let (inputs, outputs) = (case.spec.width, case.spec.total_outputs());
    let shift = &numbers(case.norm.as_ref().unwrap())[inputs..];
    let gated = matches!(case.spec.kind, WeightKind::Matrix { gated: true, .. });
    // Each sum, and the sum of the absolute values of its addends.
    let mut truth = vec![[(0.0, 0.0); 2]; outputs];
    let mut add = |column: usize, of: usize, x: f64| {
        truth[column][of].0 += x;
        truth[column][of].1 += x.abs();
    };
    for (place, x) in bytemuck::pod_collect_to_vec::<u8, f16>(packed).into_iter().enumerate() {
        add(place / inputs.next_multiple_of(CHUNK), 0, x.to_f64());
    }
    for ([output, input, _], x) in case.numbers() {
        let column = if gated { output % (outputs / 2) * 2 + output / (outputs / 2) } else { output };
        add(column, 1, f64::from(x) * shift[input]);
    }
    let sums: Vec<f32> = bytemuck::pod_collect_to_vec(sums);
    assert_eq!(sums.len(), 2 * outputs, "{case:?}");
    for (&sum, &(right, size)) in sums.iter().zip(truth.iter().flatten()) {
        // At most 70 additions in fp32, in any order.
        assert!((f64::from(sum) - right).abs() <= 70.0 * 2f64.powi(-24) * size, "{sum} for {right}: {case:?}");
    }
}

/// Every kind, format and layout, with and without a norm, bit for bit: one row at a time, a few, and the whole.
#[test]
fn forms_are_packed_as_defined() {
    let mut random = Random(1);
    for schedule in Schedule::hostile(3) {
        let device = Emulated::new(Limits::A100, schedule);
        for limit in [1, 1000, 1 << 20] {
            let cases: Vec<Case> = (0..12).map(|_| Case::random(&mut random)).collect();
            for (case, bytes) in cases.iter().zip(load(&device, &cases, limit).unwrap()) {
                let packed = packed_by_definition(case);
                assert!(bytes[..packed.len()] == packed, "limit {limit}: {case:?}");
                if has_sums(&case.spec) {
                    assert_sums(case, &packed, &bytes[behind(&case.spec)..]);
                }
            }
        }
    }
}

/// A 3x3 kernel behind a resize is packed a second time, for upsampled sources. Row 2 of an upsampled image, which is
/// even, and row 3, which is odd, see its rows 1 to 3 and 2 to 4; these are rows 0, 1, 1 and 1, 1, 2 of the source.
#[test]
fn phases_of_an_upsampled_source() {
    let (outputs, inputs, pixel) = (5, 61, 64);
    let kind = WeightKind::Matrix { kernel: 3, inputs, gated: false, resized: true };
    let cases = [Case::new(kind, vec![outputs], 9 * inputs, &mut Random(3))];
    let half = |x: f32| f16::from_f32(x.clamp(-65504.0, 65504.0));
    let seen = |parity: usize, k: usize| [[0, 1, 1], [0, 0, 1]][parity][k];
    for limit in [1, 9000, 1 << 20] {
        let both = load(&Emulated::new(Limits::A100, Emulated::QUICK), &cases, limit).unwrap().remove(0);
        let exact = packed_by_definition(&cases[0]);
        assert!(both[..exact.len()] == exact, "limit {limit}");
        let phases: Vec<f16> = bytemuck::pod_collect_to_vec(&both[behind(&cases[0].spec)..]);
        let mut wanted = vec![0.0; 4 * outputs * 4 * pixel];
        for ([output, input, tap], x) in cases[0].numbers() {
            for phase in 0..4 {
                let to = seen(phase / 2, tap / 3) * 2 + seen(phase % 2, tap % 3);
                wanted[((phase * outputs + output) * 4 + to) * pixel + input] += x;
            }
        }
        assert!(phases.iter().zip(&wanted).all(|(&x, &y)| x == half(y)), "limit {limit}");
        assert_eq!(phases.len(), wanted.len());
    }
}

/// The first bad number of the first bad weight is reported, wherever it is and whatever it is.
#[test]
fn damaged_numbers_are_found() {
    let device = Emulated::new(Limits::A100, Emulated::QUICK);
    let mut random = Random(2);
    let kind = WeightKind::Matrix { kernel: 1, inputs: 300, gated: false, resized: false };
    for (position, value) in [(0, f64::NAN), (299, f64::INFINITY), (11_999, f64::NEG_INFINITY)] {
        for _ in 0..4 {
            let mut cases = [(); 3].map(|()| Case::new(kind.clone(), vec![40], 300, &mut random));
            cases[1].spec.names[0] = "damaged".into();
            let held = cases[1].damage(0, position, value);
            cases[2].damage(0, position, value);
            let problem = load(&device, &cases, 1000).unwrap_err().to_string();
            let words = format!("tensor `damaged` holds {held} at position {position};");
            assert!(problem.contains(&words), "{problem}: {:?}", cases[1]);
        }
    }
}
