//! The names of tensors in adapter files, in the spellings of kohya's scripts, LyCORIS, PEFT and diffusers.

/// The parts of which a module's difference is computed, by the name that kohya's scripts or LyCORIS give them. The
/// first field is the end of a tensor's name. Of two ends that fit, the first in this list counts.
const PARTS: [(&str, &str); 40] = [
    (".lora_up.weight", "lora_up"),
    (".lora_down.weight", "lora_down"),
    (".lora_mid.weight", "lora_mid"),
    // PEFT, also from a training's whole state.
    (".lora_B.weight", "lora_up"),
    (".lora_A.weight", "lora_down"),
    (".lora_B.default.weight", "lora_up"),
    (".lora_A.default.weight", "lora_down"),
    // diffusers before it used PEFT.
    (".lora.up.weight", "lora_up"),
    (".lora.down.weight", "lora_down"),
    (".lora_linear_layer.up.weight", "lora_up"),
    (".lora_linear_layer.down.weight", "lora_down"),
    ("_lora.up.weight", "lora_up"),
    ("_lora.down.weight", "lora_down"),
    ("_lora.alpha", "alpha"),
    (".alpha", "alpha"),
    (".dora_scale", "dora_scale"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector.default.weight", "magnitude"),
    (".hada_w1_a", "hada_w1_a"),
    (".hada_w1_b", "hada_w1_b"),
    (".hada_t1", "hada_t1"),
    (".hada_w2_a", "hada_w2_a"),
    (".hada_w2_b", "hada_w2_b"),
    (".hada_t2", "hada_t2"),
    (".lokr_w1", "lokr_w1"),
    (".lokr_w1_a", "lokr_w1_a"),
    (".lokr_w1_b", "lokr_w1_b"),
    (".lokr_w2", "lokr_w2"),
    (".lokr_w2_a", "lokr_w2_a"),
    (".lokr_w2_b", "lokr_w2_b"),
    (".lokr_t2", "lokr_t2"),
    (".diff", "diff"),
    (".diff_b", "diff_b"),
    // LyCORIS' differences of norms.
    (".w_norm", "diff"),
    (".b_norm", "diff_b"),
    // Spellings of diffusers' conversions.
    (".lora_up.default.weight", "lora_up"),
    (".lora_down.default.weight", "lora_down"),
    (".lora.alpha", "alpha"),
    (".lora_linear_layer.alpha", "alpha"),
];

/// The networks that adapters change, by their folders in a checkpoint.
pub(super) const NETWORKS: [&str; 3] = ["unet", "text_encoder", "text_encoder_2"];

/// Beginnings of modules' names, and the networks whose modules follow. The first that fits counts.
const PREFIXES: [(&str, &[&str]); 10] = [
    ("lora_unet_", &["unet"]),
    ("lora_te1_", &["text_encoder"]),
    ("lora_te2_", &["text_encoder_2"]),
    ("lora_te_", &["text_encoder"]),
    ("lycoris_", &NETWORKS),
    ("unet.", &["unet"]),
    ("text_encoder.", &["text_encoder"]),
    ("text_encoder_2.", &["text_encoder_2"]),
    ("diffusion_model.", &["unet"]),
    ("base_model.model.", &NETWORKS),
];

/// Splits a tensor's name into that of a module, as the file spells it, and the part that the tensor is of it. `None`
/// for a tensor of no kind of adapter that is known here.
pub(super) fn split(name: &str) -> Option<(&str, &'static str)> {
    PARTS.iter().find_map(|(end, part)| Some((name.strip_suffix(end)?, *part)))
}

/// The networks in which a module may be, and its name there.
pub(super) fn place(module: &str) -> (&'static [&'static str], &str) {
    let known = PREFIXES.iter().find_map(|(prefix, networks)| Some((*networks, module.strip_prefix(prefix)?)));
    // The oldest files of diffusers hold a UNet's attention layers without a prefix.
    known.unwrap_or((&NETWORKS, module))
}

/// Other spellings of a module's name within its network, in files from before diffusers used PEFT.
pub(super) fn respelled(module: &str) -> [String; 2] {
    let module = module.replace(".processor.", ".");
    let of_text = [(".to_q", ".q_proj"), (".to_k", ".k_proj"), (".to_v", ".v_proj"), (".to_out", ".out_proj")];
    let of_text = of_text.iter().find_map(|(old, new)| Some(format!("{}{new}", module.strip_suffix(old)?)));
    let of_unet = if module.ends_with(".to_out") { format!("{module}.0") } else { module.clone() };
    [of_unet, of_text.unwrap_or(module)]
}
