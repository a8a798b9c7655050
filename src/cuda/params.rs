//! The parameter structures of kernels. Each is declared twice: in C++ beside the kernels, and here for their launches.

/// Declares mirrors of structures in `kernels/`: fields of the same names and sizes in the same order, including
/// padding. `tests/kernels/layouts.rs` compares the two declarations byte by byte.
#[doc(hidden)]
#[macro_export]
macro_rules! params {
    ($($(#[$attribute:meta])* $visibility:vis struct $name:ident { $($(#[$told:meta])* $seen:vis $field:ident: $type:ty,)* })*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        $visibility struct $name { $($(#[$told])* $seen $field: $type,)* }

        #[cfg(feature = "emulated")]
        impl $name {
            /// The structure's fields, to be compared with the kernels'.
            $visibility fn layout() -> respodiff_emulated_kernels::Layout {
                let field = |name, offset, bytes| respodiff_emulated_kernels::Field { name, offset, bytes };
                let fields =
                    vec![$(field(stringify!($field), std::mem::offset_of!($name, $field), size_of::<$type>())),*];
                respodiff_emulated_kernels::Layout { name: stringify!($name), bytes: size_of::<$name>(), fields }
            }
        }
    )*};
}

/// Every kernel with a tile that the host chooses: its threads and bytes of shared memory per block, and the blocks per
/// multiprocessor if the choice counts on them. `tests/kernels/layouts.rs` compares them with the kernels' own.
#[cfg(feature = "emulated")]
pub fn tiles() -> Vec<(&'static str, usize, usize, Option<usize>)> {
    use super::{attention, attention_gradient, attention_gradient_hopper, attention_hopper, tiles};
    let mut all: Vec<_> =
        tiles::TILES.iter().map(|tile| (tile.kernel, tile.threads(), tile.shared(), Some(tile.resident))).collect();
    let mut add = |kernel, threads, shared| all.push((kernel, threads, shared, None));
    attention::TILES.iter().for_each(|tile| add(tile.kernel, tile.threads(), tile.shared()));
    attention_hopper::TILES.iter().for_each(|tile| add(tile.kernel, tile.threads, tile.shared));
    for tile in &attention_gradient::TILES {
        for kernel in [tile.by_query, tile.by_key] {
            add(kernel, attention_gradient::THREADS, tile.shared());
        }
    }
    for tile in &attention_gradient_hopper::TILES {
        for kernel in [tile.by_query, tile.by_key] {
            add(kernel, attention_gradient_hopper::THREADS, tile.shared());
        }
    }
    all
}

/// The layouts of the engine's structures in Rust. Those of the tests' kernels are in the tests.
#[cfg(feature = "emulated")]
pub fn layouts() -> Vec<respodiff_emulated_kernels::Layout> {
    use super::{attention, attention_gradient, attention_gradient_hopper, attention_hopper, conv, conv_hopper};
    use super::{elementwise, epilogue, group_norm, layer_norm, sampler, weights};
    vec![
        attention::AttentionParams::layout(),
        attention_gradient::AttentionGradientParams::layout(),
        attention_gradient_hopper::AttentionGradientHopperParams::layout(),
        attention_hopper::AttentionHopperParams::layout(),
        conv::ConvParams::layout(),
        conv_hopper::ConvHopperParams::layout(),
        epilogue::Epilogue::layout(),
        elementwise::ElementParams::layout(),
        elementwise::ResizeGradientParams::layout(),
        elementwise::RowParams::layout(),
        elementwise::SinusoidParams::layout(),
        group_norm::GroupNormParams::layout(),
        group_norm::GroupNormGradientParams::layout(),
        layer_norm::LayerNormParams::layout(),
        sampler::DeviceStep::layout(),
        sampler::Slot::layout(),
        sampler::LatentSize::layout(),
        sampler::NoiseParams::layout(),
        sampler::PrepareParams::layout(),
        sampler::RescaleParams::layout(),
        sampler::GuideAndStepParams::layout(),
        sampler::LatentsForVaeParams::layout(),
        sampler::ToRgb8Params::layout(),
        weights::PackParams::layout(),
    ]
}
