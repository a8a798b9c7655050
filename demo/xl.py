"""Turns the demo into SDXL's layout: two text encoders and a UNet of three levels, ready for `train_xl.py`.

`text_encoder_2` is the text tower of the demo's CLIP with its projection. `text_encoder` is a narrow tower that learns
here to give the same states as the demo's text encoder. The UNet starts from the demo's weights: its levels 2 and 3,
which attend to the text, from the demo's two levels, and its level 1, which does not, from the residual blocks of the
first.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common import CACHE, CLIP, MODEL, XL, begin, cosine, save_half
from world import all_captions

WIDTH = 32  # channels of the narrow tower
DISTILLING = 1500  # steps of its training
SIZE = (64, 64, 0, 0, 64, 64)  # original height and width, crop from the top and left, target height and width


def build():
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(64, 128, 64), norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 1], attention_head_dim=[2, 4, 4], use_linear_projection=True,
        cross_attention_dim=WIDTH + 128, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 64)


def tokens_of(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def narrow_tower(tokenizer, teacher, rng):
    """A tower of two narrow layers, trained so that a linear map of each layer's states gives those of `teacher`."""
    wide = teacher.config
    tower = CLIPTextModel(CLIPTextConfig(
        vocab_size=wide.vocab_size, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, hidden_act="quick_gelu", projection_dim=wide.projection_dim,
        bos_token_id=wide.bos_token_id, eos_token_id=wide.eos_token_id, pad_token_id=wide.pad_token_id))
    readers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, wide.hidden_size) for _ in range(2))
    trained = [*tower.parameters(), *readers.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.99))
    captions = [c.text for c in all_captions()]
    for step in range(DISTILLING):
        tokens = tokens_of(tokenizer, rng.choices(captions, k=48))
        with torch.no_grad():
            told = teacher(tokens).last_hidden_state
        states = tower(tokens, output_hidden_states=True)
        loss = sum(F.mse_loss(reader(state), told)
                   for reader, state in zip(readers, (states.hidden_states[-2], states.last_hidden_state)))
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * cosine(step, DISTILLING)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if (step + 1) % 100 == 0:
            print(f"narrow tower step {step + 1}: loss {loss.item():.4f} of {2 * told.var().item():.4f}", flush=True)
    return tower.eval()


class Texts:
    """Encodes texts as SDXL does: the penultimate states of both towers side by side, and the second's projection."""

    def __init__(self, tokenizer, towers):
        self.tokenizer, self.towers = tokenizer, towers

    @torch.no_grad()
    def __call__(self, texts):
        tokens = tokens_of(self.tokenizer, texts)
        first, second = (tower(tokens, output_hidden_states=True) for tower in self.towers)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], 2), second.text_embeds


def towers():
    return [kind.from_pretrained(XL / name, torch_dtype=torch.float32).eval()
            for kind, name in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))]


@torch.no_grad()
def translation(texts, teacher, captions):
    """The matrix that maps SDXL's states as nearly as possible to the states that the demo's attention reads."""
    states = texts(captions)[0].flatten(0, 1).double()
    told = teacher(tokens_of(texts.tokenizer, captions)).last_hidden_state.flatten(0, 1).double()
    matrix = torch.linalg.lstsq(states, told).solution
    print(f"translation: {((states @ matrix - told).var() / told.var()).item():.4f} of the variance is lost")
    return matrix.float()


def source(name):
    """The name of the demo's tensor that `name` starts from. Levels 1 and 2 keep the demo's resolution."""
    block, rest = name.split(".", 1)
    if block == "mid_block":  # as wide as the demo's first level
        level, _, inner = rest.partition(".")
        return f"down_blocks.0.{level}.0.{inner.split('.', 1)[1]}"
    for own, demo in (("down_blocks.2.", "down_blocks.0."), ("up_blocks.0.", "up_blocks.1."),
                      ("up_blocks.1.", "up_blocks.0."), ("up_blocks.2.", "up_blocks.1.")):
        if name.startswith(own):
            return name.replace(own, demo)
    return name


def joined(value, shape):
    """Weights of the first up block. The demo's reads its bottleneck beside a skip connection, and the bottleneck is
    that skip plus a residual. Without a bottleneck of that size the skip stands for both, and the new bottleneck starts
    with small weights."""
    own = shape[1] - 128 if len(shape) == 4 else shape[0] - 128
    if len(shape) == 1:
        both = (value[:128] + value[128:]) / 2
        return torch.cat([both[:own], both])
    whole = value[:, :128] + value[:, 128:]
    return torch.cat([0.3 * value[:, :own], whole], 1)


def start(demo, matrix):
    """The UNet before training, with `demo`'s weights wherever there is a place for them."""
    unet, given = build(), demo.state_dict()
    for name, tensor in unet.state_dict().items():
        value = given.get(source(name))
        if name.startswith("add_embedding.linear_2."):
            tensor.zero_()  # sizes and pooled texts have no effect yet
        elif value is not None and (".attn2.to_k." in name or ".attn2.to_v." in name):
            tensor.copy_(value @ matrix.T)
        elif value is not None and value.numel() == tensor.numel():
            tensor.copy_(value.view_as(tensor))  # 1x1 convolutions become linear layers
        elif name.startswith("up_blocks.1.resnets.0."):
            tensor.copy_(joined(value, tensor.shape))
        else:
            print(f"  new: {name} {tuple(tensor.shape)}")
            if name == "up_blocks.0.upsamplers.0.conv.weight":
                torch.nn.init.dirac_(tensor)
    return unet


def main():
    rng = begin(11)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    teacher = CLIPTextModel.from_pretrained(MODEL / "text_encoder", torch_dtype=torch.float32).eval()
    clip = CLIPModel.from_pretrained(CLIP, torch_dtype=torch.float32)
    second = CLIPTextModelWithProjection(clip.config.text_config)
    second.text_model.load_state_dict(clip.text_model.state_dict())
    second.text_projection.load_state_dict(clip.text_projection.state_dict())
    save_half(second, XL / "text_encoder_2")
    save_half(narrow_tower(tokenizer, teacher, rng), XL / "text_encoder")
    texts = Texts(tokenizer, towers())
    captions = [c.text for c in all_captions()]
    matrix = translation(texts, teacher, rng.sample(captions, 600))
    demo = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=torch.float32)
    with torch.no_grad():
        unet = start(demo, matrix)
    torch.save(unet.state_dict(), CACHE / "xl_unet.pt")


if __name__ == "__main__":
    main()
