//! The parameter structures of kernels are declared twice, in C++ and in Rust, and passed as bytes, so both languages
//! must lay them out alike. Otherwise, a GPU would read wrong values.

use super::conformance;
use respodiff_emulated_kernels::{Layout, kernels, layouts};
use std::collections::BTreeMap;

/// True if the fields follow one another without gaps and fill the structure.
fn is_covered(layout: &Layout) -> bool {
    let end = layout.fields.iter().try_fold(0, |at, field| (field.offset == at).then_some(at + field.bytes));
    end == Some(layout.bytes)
}

#[test]
fn both_languages_lay_structures_out_alike() {
    let theirs = layouts();
    let ours = [respodiff::cuda::layouts(), conformance::layouts()].concat();
    for layout in ours.iter().chain(&theirs) {
        assert!(is_covered(layout), "bytes that belong to no field, or fields out of order: {layout:#?}");
    }
    for layout in &theirs {
        let mirrors: Vec<&Layout> = ours.iter().filter(|ours| ours.name == layout.name).collect();
        assert_eq!(mirrors, [layout], "in Rust, and in C++");
    }
    for layout in &ours {
        assert!(theirs.iter().any(|theirs| theirs.name == layout.name), "{}: no LAYOUT in kernels/", layout.name);
    }
}

#[test]
fn every_kernel_takes_a_structure_that_is_compared() {
    let kernels = kernels();
    assert!(kernels.len() > 50, "{} kernels", kernels.len());
    for kernel in kernels {
        assert!(kernel.structure.is_some(), "{} takes a structure without a LAYOUT beside it", kernel.name);
    }
}

/// The host chooses tiles by tables of its own: a launch with less shared memory than the kernel's would be out of
/// bounds, and one with more would be estimated and run worse than it could.
#[test]
fn both_languages_agree_on_every_tile() {
    let exported = kernels().into_iter().filter_map(|kernel| Some((kernel.name, kernel.occupancy?)));
    let mut theirs: BTreeMap<_, _> = exported.collect();
    for (kernel, threads, shared, resident) in respodiff::cuda::tiles() {
        let tile = theirs.remove(kernel).unwrap_or_else(|| panic!("{kernel} is not exported with a tile"));
        assert_eq!(
            (threads, shared),
            (tile.threads as usize, tile.shared as usize),
            "{kernel}: threads, shared memory"
        );
        assert!(resident.is_none_or(|blocks| blocks == tile.resident as usize), "{kernel}: {resident:?} of {tile:?}");
    }
    assert!(theirs.is_empty(), "in no table of src/cuda: {theirs:?}");
}
