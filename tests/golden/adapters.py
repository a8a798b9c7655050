"""Records adapters of every format, and what networks compute with them.

PEFT's adapters run as PEFT runs them, beside the layers. LyCORIS' modules give the differences of theirs. All others
are computed in float64 by the formula of the format.
"""

import json

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from lycoris.modules.loha import LohaModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from calls import load, prompts
from common import CASES, ROOT, randn, save_case, sorted_header

ADAPTERS = ROOT / "adapters"

#: Modules of the UNets: linear, gated, 1x1 and 3x3 layers, in every part.
UNET = {
    "sd1": [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.1.attentions.2.proj_in",
        "up_blocks.2.attentions.1.transformer_blocks.0.ff.net.2",
        "down_blocks.1.resnets.0.conv1",
        "up_blocks.3.resnets.2.time_emb_proj",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.1.upsamplers.0.conv",
        "up_blocks.2.resnets.0.conv_shortcut",
        "conv_out",
    ],
    "sdxl": [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
        "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k",
        "mid_block.attentions.0.proj_out",
        "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
        "mid_block.resnets.1.conv2",
        "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.2.resnets.1.conv1",
        "time_embedding.linear_1",
        "add_embedding.linear_2",
        "conv_in",
    ],
}
#: The same in the numbering of the original code, for SDXL.
ORIGINAL = [
    "input_blocks_4_1_transformer_blocks_0_attn1_to_v",
    "input_blocks_8_1_transformer_blocks_1_attn2_to_k",
    "middle_block_1_proj_out",
    "output_blocks_2_1_transformer_blocks_0_ff_net_0_proj",
    "output_blocks_4_1_transformer_blocks_0_attn2_to_out_0",
    "middle_block_2_out_layers_3",
    "input_blocks_4_0_skip_connection",
    "input_blocks_3_0_op",
    "output_blocks_2_2_conv",
    "output_blocks_7_0_in_layers_2",
    "time_embed_0",
    "label_emb_0_2",
    "input_blocks_0_0",
]
TEXT = [
    "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model.encoder.layers.1.self_attn.out_proj",
    "text_model.encoder.layers.1.mlp.fc1",
]
PARTS = {
    "sd1": {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel},
    "sdxl": {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    },
}
KOHYA = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}


def modules(checkpoint, part):
    return UNET[checkpoint] if part == "unet" else TEXT


def networks(checkpoint):
    return {part: load(kind, checkpoint, part) for part, kind in PARTS[checkpoint].items()}


def outputs(checkpoint, parts):
    """The outputs of each network on the inputs of its first recorded case."""
    case = load_file(CASES / f"unet_{checkpoint}_0.safetensors")
    added = {name: case[name] for name in ("text_embeds", "time_ids") if name in case}
    results = {}
    for part, model in parts.items():
        if part == "unet":
            inputs = {name: case[name] for name in ("sample", "timestep", "encoder_hidden_states")}
            results["out.unet"] = model(**inputs, added_cond_kwargs=added or None).sample
        else:
            ids = prompts(f"{checkpoint}/{part}", above=False)[:1]
            out = model(ids, output_hidden_states=True)
            results[f"input_ids.{part}"] = ids
            results[f"out.{part}"] = out.hidden_states[-2][:, :24]
    return results


def write(name, tensors, results, checkpoint, weight, plain, notes=None):
    ADAPTERS.mkdir(exist_ok=True)
    tensors = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    (ADAPTERS / f"{name}.safetensors").write_bytes(sorted_header(save(tensors, metadata=notes)))
    moved = {key: (results[key] - value).norm() / value.norm() for key, value in plain.items() if key.startswith("out")}
    print(f"  {name}: outputs move by", ", ".join(f"{key} {by:.2f}" for key, by in moved.items()))
    save_case(f"adapter_{name}", results, {"checkpoint": checkpoint, "weight": str(weight)})


def numbers(label, *shape, scale=1.0):
    """Numbers that fp16 holds exactly."""
    return (randn(f"adapters/{label}", *shape) * scale).half()


def lora(label, weight, rank, mid=False, scale=0.6):
    """Down, up (and mid) for a layer's weight; the product has about the size of the weight."""
    outputs, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    if mid and kernel != ones:
        return {
            "lora_down.weight": numbers(f"{label}/down", rank + 1, inputs, *ones, scale=inputs**-0.5),
            "lora_mid.weight": numbers(f"{label}/mid", rank, rank + 1, *kernel, scale=(rank + 1) ** -0.5 / 3),
            "lora_up.weight": numbers(f"{label}/up", outputs, rank, *ones, scale=scale),
        }
    size = inputs * max(1, torch.tensor(kernel).prod().item())
    return {
        "lora_down.weight": numbers(f"{label}/down", rank, inputs, *kernel, scale=size**-0.5),
        "lora_up.weight": numbers(f"{label}/up", outputs, rank, *ones, scale=scale),
    }


def product(parts):
    """The difference of a LoRA in float64, before its scale."""
    up, down = parts["lora_up.weight"].double(), parts["lora_down.weight"].double()
    if "lora_mid.weight" in parts:
        mid = parts["lora_mid.weight"].double()
        return torch.einsum("om,mnhw,ni->oihw", up.flatten(1), mid, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def by_formula(name, checkpoint, weight, spell, parts_of, difference, plain):
    """An adapter whose merged weights are computed here. `spell` gives a module's name in the file, `parts_of` its
    tensors, and `difference` the change of the weight by them, in float64."""
    parts, tensors = networks(checkpoint), {}
    for part, model in parts.items():
        for i, module in enumerate(modules(checkpoint, part)):
            layer = model.get_submodule(module)
            label = f"{name}/{part}/{module}"
            own = parts_of(label, i, layer)
            spelled = spell(part, i, module)
            tensors |= {f"{spelled}.{key}": value for key, value in own.items()}
            change = difference(own).reshape(layer.weight.shape)
            layer.weight.copy_((layer.weight.double() + weight * change).float())
    write(name, tensors, outputs(checkpoint, parts), checkpoint, weight, plain[checkpoint])


def kohya_name(checkpoint):
    return lambda part, i, module: KOHYA[checkpoint][part] + module.replace(".", "_")


def kohya(plain):
    """kohya's LoRA: alphas, some layers with a kernel in the middle, some without alpha."""

    def parts_of(label, i, layer):
        parts = lora(label, layer.weight, 2 + i % 3, mid=i % 2 == 0)
        return parts if i % 4 == 3 else parts | {"alpha": torch.tensor(1.5 + i % 3)}

    def difference(parts):
        rank = parts["lora_down.weight"].shape[0]
        return product(parts) * (parts["alpha"].double() / rank if "alpha" in parts else 1)

    by_formula("sd1_kohya", "sd1", 0.8, kohya_name("sd1"), parts_of, difference, plain)

    def original(part, i, module):
        return f"lora_unet_{ORIGINAL[i]}" if part == "unet" else kohya_name("sdxl")(part, i, module)

    check_original()
    by_formula("sdxl_original", "sdxl", -0.7, original, parts_of, difference, plain)


def check_original():
    """diffusers reads the attention layers under the original names as those that are meant here."""
    config = load(UNet2DConditionModel, "sdxl", "unet").config
    for original, module in zip(ORIGINAL, UNET["sdxl"]):
        if "attentions" in module:
            mapped = _maybe_map_sgm_blocks_to_diffusers({f"lora_unet_{original}.lora_down.weight": 0}, config)
            expected = "lora_unet_" + module.replace(".", "_")
            name = next(iter(mapped)).split(".")[0]
            for old, new in (("input_b", "down_b"), ("middle_block", "mid_block"), ("output_b", "up_b")):
                name = name.replace(old, new)
            assert name == expected, (original, module, mapped)


def processors(plain):
    """The oldest files of diffusers: attention processors, here without a prefix."""

    def spell(module):
        block, layer = module.replace(".to_out.0", ".to_out").rsplit(".", 1)
        return f"{block}.processor.{layer}_lora"

    def parts_of(label, layer):
        parts = lora(label, layer.weight, 4)
        return {".down.weight": parts["lora_down.weight"].float(), ".up.weight": parts["lora_up.weight"].float()}

    def difference(parts):
        return product({f"lora_{key[1:]}": value for key, value in parts.items()})

    parts, tensors = networks("sd1"), {}
    for module in UNET["sd1"]:
        if ".attn" in module:
            layer = parts["unet"].get_submodule(module)
            own = parts_of(f"processors/{module}", layer)
            tensors |= {spell(module) + key: value for key, value in own.items()}
            layer.weight.copy_((layer.weight.double() + difference(own)).float())
    # Two layers of the text encoder, as they were called then.
    for layer_name, old in (("q_proj", "to_q"), ("out_proj", "to_out")):
        module = f"text_model.encoder.layers.1.self_attn.{layer_name}"
        layer = parts["text_encoder"].get_submodule(module)
        own = parts_of(f"processors/{module}", layer)
        spelled = f"text_encoder.text_model.encoder.layers.1.self_attn.{old}_lora"
        tensors |= {spelled + key: value for key, value in own.items()}
        layer.weight.copy_((layer.weight.double() + difference(own)).float())
    write("sd1_processors", tensors, outputs("sd1", parts), "sd1", 1.0, plain["sd1"])


def whole(plain):
    """Full differences of weights and biases, in bf16, and of a norm."""

    def parts_of(label, i, layer):
        size = 0.3 * float(layer.weight.std())
        parts = {"diff": numbers(f"{label}/diff", *layer.weight.shape, scale=size).bfloat16()}
        if layer.bias is not None:
            parts["diff_b"] = numbers(f"{label}/bias", *layer.bias.shape, scale=0.2).bfloat16()
        return parts

    parts, tensors = networks("sd1"), {}
    wanted = [("unet", module) for module in UNET["sd1"][3:5] + UNET["sd1"][-1:]] + [("text_encoder", TEXT[2])]
    norm = "mid_block.resnets.0.norm1"
    for part, module in wanted + [("unet", norm)]:
        layer = parts[part].get_submodule(module)
        own = parts_of(f"whole/{module}", 0, layer)
        layer.weight.copy_(layer.weight + 0.5 * own["diff"].float())
        if "diff_b" in own:
            layer.bias.copy_(layer.bias + 0.5 * own["diff_b"].float())
        names = {"diff": "w_norm", "diff_b": "b_norm"} if module == norm else {}
        spelled = kohya_name("sd1")(part, 0, module)
        tensors |= {f"{spelled}.{names.get(key, key)}": value for key, value in own.items()}
    write("sd1_whole", tensors, outputs("sd1", parts), "sd1", 0.5, plain["sd1"])


def lycoris(name, checkpoint, weight, kind, plain, **settings):
    """An adapter of LyCORIS' own modules, each of which merges itself. DoRA at other weights than 1 is interpolated, as
    A1111 and ComfyUI do."""
    parts, tensors = networks(checkpoint), {}
    for part, model in parts.items():
        for i, module in enumerate(modules(checkpoint, part)):
            layer = model.get_submodule(module)
            spelled = kohya_name(checkpoint)(part, i, module)
            own = {key: value(i) if callable(value) else value for key, value in settings.items()}
            change = kind(spelled, layer, 1.0, **own)
            for key, parameter in change.named_parameters():
                label = f"{name}/{module}/{key}"
                if key == "dora_scale":
                    parameter.copy_(parameter * (1 + 0.2 * randn(f"adapters/{label}", *parameter.shape)))
                else:
                    size = {"lora_up.weight": 1.0, "lora_down.weight": parameter[0].numel() ** -0.5}.get(key, 0.45)
                    parameter.copy_(numbers(label, *parameter.shape, scale=size).float())
            state = change.custom_state_dict()
            halved = {key: value if "dora" in key else value.half() for key, value in state.items()}
            tensors |= {f"{spelled}.{key}": value for key, value in halved.items()}
            # Merging by LoHa's and LoKr's own methods would apply alpha / rank twice; in training it is applied once.
            shape = layer.weight.shape
            difference = change.get_diff_weight(shape=shape)[0] if kind is LoConModule else change.get_weight(shape)
            merged = layer.weight + difference
            if change.wd:
                merged = change.apply_weight_decompose(merged)
            layer.weight.copy_(layer.weight + weight * (merged - layer.weight))
    write(name, tensors, outputs(checkpoint, parts), checkpoint, weight, plain[checkpoint])


def peft(name, checkpoint, weight, plain, unet_config, text_config):
    """An adapter of PEFT, saved and run as diffusers does."""
    parts, tensors, notes = networks(checkpoint), {}, {}
    torch.manual_seed(0)
    for part, model in parts.items():
        settings = unet_config if part == "unet" else text_config
        config = LoraConfig(**settings, target_modules=modules(checkpoint, part))
        model.add_adapter(config, "it")
        for key, parameter in model.named_parameters():
            if ".lora_magnitude_vector." in key:
                parameter.data.copy_(parameter * (1 + 0.2 * randn(f"adapters/{name}/{key}", *parameter.shape)))
            elif ".lora_" in key:
                size = 0.5 if ".lora_B." in key else parameter[0].numel() ** -0.5
                parameter.data.copy_(numbers(f"{name}/{key}", *parameter.shape, scale=size).float())
        # PEFT's own `set_scale` forgets rank-stabilised scales.
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scaling["it"] *= weight
        state = get_peft_model_state_dict(model, adapter_name="it")
        halved = {key: value if "magnitude" in key else value.half() for key, value in state.items()}
        tensors |= {f"{part}.{key}": value for key, value in halved.items()}
        wanted = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_dora", "use_rslora", "target_modules")
        fields = {key: getattr(config, key) for key in wanted}
        described = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
        notes |= {f"{part}.{key}": value for key, value in described.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(notes, indent=2, sort_keys=True, default=str)}
    write(name, tensors, outputs(checkpoint, parts), checkpoint, weight, plain[checkpoint], header)


@torch.no_grad()
def record(args):
    plain = {checkpoint: outputs(checkpoint, networks(checkpoint)) for checkpoint in PARTS}
    kohya(plain)
    processors(plain)
    whole(plain)
    lycoris("sd1_locon", "sd1", 1.0, LoConModule, plain, lora_dim=3, alpha=2, use_tucker=True)
    lycoris("sd1_loha", "sd1", 0.9, LohaModule, plain, lora_dim=3, alpha=2, use_tucker=lambda i: i % 2 == 0)
    lycoris(
        "sdxl_lokr", "sdxl", 0.6, LokrModule, plain, lora_dim=lambda i: 1 + i % 2, alpha=3,
        factor=lambda i: [2, 4, -1][i % 3], decompose_both=lambda i: i % 3 == 0, full_matrix=lambda i: i % 4 == 1,
        use_tucker=lambda i: i % 2 == 0,
    )
    dora = dict(lora_dim=2, alpha=1, weight_decompose=True)
    lycoris("sd1_dora_outputs", "sd1", 1.0, LoConModule, plain, **dora, wd_on_out=True)
    lycoris("sdxl_dora_inputs", "sdxl", 0.7, LohaModule, plain, **dora, wd_on_out=False)
    first = UNET["sd1"][0]
    patterns = dict(alpha_pattern={first: 2, "ff.net.2": 9}, rank_pattern={first: 3})
    peft(
        "sd1_peft", "sd1", 0.75, plain,
        dict(r=4, lora_alpha=6, **patterns, init_lora_weights=False),
        dict(r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False),
    )
    peft(
        "sdxl_peft_dora", "sdxl", 1.0, plain,
        dict(r=2, lora_alpha=3, use_dora=True, init_lora_weights=False),
        dict(r=2, lora_alpha=2, use_dora=True, init_lora_weights=False),
    )
