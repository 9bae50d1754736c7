"""Checkpoints as the original project wrote them: a pickled module of classes we do not have.

Run as a program, in a process of its own, it builds a model of fake classes under the original
names with random weights, and saves it with what it predicts. The process that converts the
checkpoint never sees these classes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    **{"image": 32, "patch": 8, "width": 192, "depth": 12, "heads": 6, "ratio": 4.0},
    **{"groups": 48, "kernel": 1, "stem": 32, "inception": [16, 16, 8, 8, 4]},
    **{"magnitude": 1024, "branch": 1096, "head": 1024, "eps": 1e-6},
}
SMALL = {
    **{"width": 48, "depth": 2, "heads": 3, "ratio": 2.0, "groups": 12, "kernel": 3, "stem": 8},
    **{"inception": [4, 4, 2, 2, 1], "magnitude": 24, "branch": 40, "head": 16, "eps": 1e-5},
}


def make(folder: Path, **sizes: Any) -> Path:
    """Write one model as a file per form, and predictions.npz: images, magnitudes, z_phot.

    parallel.pt is the original's form, a DataParallel; then there are protocol_4.pt (the same),
    module.pt, state_dict.pt and parallel_state_dict.pt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, str(folder), json.dumps({**SIZES, **sizes})]
    subprocess.run(words, check=True, timeout=50)
    return folder


def fake_modules(spec: dict[str, Any]) -> Any:
    """Register the original's modules, and return a model of their classes."""
    import torch
    from torch import nn

    def conv(a: int, b: int, kernel: int) -> nn.Module:
        return ConvBlock(a, b, kernel_size=kernel, padding=kernel // 2)

    class ConvBlock(nn.Module):
        def __init__(self, a: int, b: int, **options: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(a, b, **options)
            self.bn = nn.BatchNorm2d(b)

        def forward(self, x):
            return self.bn(self.conv(x)).relu()

    class InceptionBlock(nn.Module):
        def __init__(self, a: int, b: int, is_custom: bool) -> None:
            super().__init__()
            self.is_custom = is_custom
            self.branch1 = conv(a, b, 1)
            self.branch2 = nn.Sequential(conv(a, b, 1), conv(b, b, 3))
            self.branch3 = nn.Sequential(conv(a, b, 1), conv(b, b, 5))
            self.branch4 = nn.Sequential(nn.MaxPool2d(3, padding=1, stride=1), conv(a, b, 1))

        def forward(self, x):
            third = () if self.is_custom else (self.branch3(x),)
            return torch.cat((self.branch1(x), self.branch2(x), *third, self.branch4(x)), 1)

    class Input_Mix_Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Inception_only, self.magnitude, self.uk_paper = False, True, False
            self.embed_dim, self.device = spec["width"], "cuda"
            self.conv2d_init = nn.Conv2d(5, spec["stem"], (1, 1), padding_mode="zeros")
            self.avgpool, self.avgpool2 = nn.AvgPool2d(2, stride=2), nn.AvgPool2d(2, stride=2)
            wide = spec["magnitude"]
            layers: list[nn.Module] = [nn.Linear(5, wide)]
            for _ in range(4):
                layers += [nn.ReLU(), nn.Linear(wide, wide)]
            self.magnitude_block = nn.Sequential(*layers)
            self.config = [{"in_channel": 32, "out_11": n} for n in spec["inception"]]
            self.vis_inception = nn.Sequential(*self.layers())

        def layers(self) -> list[nn.Module]:
            made, a = [self.conv2d_init, self.avgpool], spec["stem"]
            for i, b in enumerate(spec["inception"]):
                made.append(InceptionBlock(a, b, i == 4))
                made += [nn.AvgPool2d(kernel_size=2)] if i in (1, 3) else []
                a = 4 * b
            flat, out = 3 * b * (spec["image"] // 8) ** 2, spec["branch"]
            return [*made, nn.Flatten(), nn.Linear(flat, out), nn.ReLU(), nn.Linear(out, out)]

        def forward(self, x):
            return torch.cat((self.vis_inception(x[0]), self.magnitude_block(x[1].float())), 1)

    class Mlp(nn.Module):
        def __init__(self, width: int, hidden: int) -> None:
            super().__init__()
            self.hidden_features = hidden
            self.fc1, self.act = nn.Linear(width, hidden), nn.GELU()
            self.fc2, self.drop = nn.Linear(hidden, width), nn.Dropout(0.1)

        def forward(self, x):
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.num_heads = spec["heads"]
            self.scale = (width // self.num_heads) ** -0.5
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
            self.attn_drop = nn.Dropout(0.1)
            self.proj, self.proj_drop = nn.Linear(width, width), nn.Dropout(0.1)

        def forward(self, x):
            b, n, width = x.shape
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
            qkv = (x @ self.qkv.weight.T + bias).reshape(b, n, 3, self.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mix = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(-1))
            return self.proj_drop(self.proj((mix @ v).transpose(1, 2).reshape(b, n, width)))

    class NormalCell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, hidden = spec["width"], int(spec["width"] * spec["ratio"])
            around = (spec["kernel"], 1, spec["kernel"] // 2, 1, spec["groups"])
            self.norm1, self.class_token = nn.LayerNorm(width, eps=spec["eps"]), True
            self.attn, self.drop_path = Attention(width), nn.Identity()
            self.norm2, self.mlp = nn.LayerNorm(width, eps=spec["eps"]), Mlp(width, hidden)
            first, last = nn.Conv2d(width, hidden, *around), nn.Conv2d(hidden, width, *around)
            self.PCM = nn.Sequential(first, nn.BatchNorm2d(hidden), nn.SiLU(inplace=True), last)

        def forward(self, x):
            b, n, c = x.shape
            side = int((n - 1) ** 0.5)
            grid = x[:, 1:].reshape(b, side, side, c).permute(0, 3, 1, 2)
            local = self.PCM(grid.contiguous()).permute(0, 2, 3, 1).reshape(b, n - 1, c)
            x = x + self.attn(self.norm1(x))
            x[:, 1:] = x[:, 1:] + local
            return x + self.mlp(self.norm2(x))

    class PatchEmbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            patch, self.flatten = spec["patch"], True
            self.img_size, self.patch_size = (spec["image"],) * 2, (patch, patch)
            self.proj, self.norm = nn.Conv2d(5, spec["width"], patch, patch), nn.Identity()

        def forward(self, x):
            return self.norm(self.proj(x).flatten(2).transpose(1, 2))

    class ViT_Astro(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, out = spec["width"], spec["branch"]
            self.embed_dim = width
            self.fc_norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width)
            self.inception_model = Input_Mix_Model()
            tokens = (spec["image"] // spec["patch"]) ** 2 + 1
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
            self.blocks = nn.ModuleList(NormalCell() for _ in range(spec["depth"]))
            self.patch_embed = PatchEmbed()
            # As the original has it, misspelt: parameters with an attribute are pickled otherwise.
            for parameter in self.patch_embed.parameters():
                parameter.requres_grad = False
            self.vit_block = nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out))
            joined = 2 * out + spec["magnitude"]
            self.concat_block = nn.Sequential(
                nn.Linear(joined, spec["head"]), nn.ReLU(), nn.Linear(spec["head"], 1)
            )

        def forward(self, x):
            tokens = self.patch_embed(x[0])
            tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), 1)
            tokens = tokens + self.pos_embed
            for block in self.blocks:
                tokens = block(tokens)
            seen = self.vit_block(self.head(self.fc_norm(tokens[:, 1:].mean(1))))
            return self.concat_block(torch.cat((seen, self.inception_model(x)), 1))

    places = {
        "blocks.model_vit_inception": [ViT_Astro],
        "blocks.photoz": [Input_Mix_Model, InceptionBlock, ConvBlock],
        "NormalCell": [NormalCell, Attention, Mlp],
        "timm.models.layers.patch_embed": [PatchEmbed],
    }
    for place, classes in places.items():
        parts = place.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for cls in classes:
            cls.__module__, cls.__qualname__ = place, cls.__name__
            setattr(sys.modules[place], cls.__name__, cls)
    return ViT_Astro()


def randomise(model: Any) -> None:
    """Weights of a magnitude that leaves every part of the model visible in the result."""
    import torch

    generator = torch.Generator().manual_seed(11)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.3, 3, generator=generator)
        elif value.ndim > 1 and name not in ("cls_token", "pos_embed"):
            # Sums of twelve blocks grow; more of PCM would drown what attention adds.
            gain = 0.4 if ".PCM.3." in name else 1.4
            value.normal_(0, gain * value[0].numel() ** -0.5, generator=generator)
        elif value.is_floating_point():
            centre = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
            value.normal_(centre, 0.3, generator=generator)
        else:
            value.fill_(12_345)


def main() -> None:
    import numpy as np
    import torch

    folder, spec = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(3)
    model = fake_modules(spec)
    randomise(model)
    images, magnitudes = torch.randn(8, 5, spec["image"], spec["image"]), torch.randn(8, 5) + 1
    with torch.no_grad():
        z_phot = model.eval()([images, magnitudes])[:, 0]
    np.savez(folder / "predictions.npz", images=images, magnitudes=magnitudes, z_phot=z_phot)
    model.train()  # the original was saved as training left it
    parallel = torch.nn.DataParallel(model)
    # As on a machine with two GPUs, and the Inception branch's part on one of them.
    parallel.device_ids, parallel.output_device, parallel.dim = [0, 1], 0, 0
    parallel.src_device_obj = torch.device("cuda", 0)
    seen = model.inception_model.vis_inception
    moved = {value.data_ptr() for value in seen.state_dict().values()}
    tag = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: (
        "cuda:0" if storage.data_ptr() in moved else tag(storage)
    )
    torch.save(parallel, folder / "parallel.pt")
    torch.save(parallel, folder / "protocol_4.pt", pickle_protocol=4)
    torch.save(model, folder / "module.pt")
    torch.save(model.state_dict(), folder / "state_dict.pt")
    torch.save(parallel.state_dict(), folder / "parallel_state_dict.pt")


if __name__ == "__main__":
    main()
