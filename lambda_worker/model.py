"""AstroMAE's redshift regressor, from the published size down to the demo's.

The family is that of Fathkouhi & Fox, "AstroMAE: Redshift Prediction Using a Masked Autoencoder
with a Novel Fine-Tuning Architecture" (2024, arXiv:2409.01825): a vision transformer over image
patches, an Inception branch over the same image, and a perceptron over the five magnitudes;
their outputs are concatenated and regressed to one number. `ModelConfig()` is the published size,
and its `state_dict` has the published names and shapes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lambda_worker.engine import ModelError

NORM_EPS = 1e-6  # timm's value for vision transformers, which the published weights expect


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of an AstroMAE, and the scaling of its inputs; the defaults are the published model.

    Attributes:
        image_size: side of the square cutout, pixels; a multiple of 8 and of `patch`.
        bands: channels of the image and length of the magnitude vector (ugriz).
        patch, width, depth, heads, mlp_ratio: the vision transformer.
        pcm_groups, pcm_kernel: grouped convolution that runs beside each block's attention.
        norm_eps: epsilon of the LayerNorms of the transformer's blocks.
        stem: channels of the 1x1 convolution that opens the Inception branch.
        inception: channels of each branch of the five Inception blocks.
        magnitude_width: width of the five layers of the magnitude branch.
        branch_width: length of the transformer's and the Inception branch's outputs.
        head_width: hidden layer of the final regression.
        asinh_softening: flux per band (nanomaggies) where the image's scale turns from linear to
            logarithmic (Lupton et al. 1999, AJ 118, 1406); empty: the image enters as it is.
        magnitude_mean, magnitude_mix: magnitudes enter as `(m - mean) @ mix`, `mix` a square matrix
            in rows; empty: they enter as they are.
    """

    image_size: int = 32
    bands: int = 5
    patch: int = 8
    width: int = 192
    depth: int = 12
    heads: int = 6
    mlp_ratio: int = 4
    pcm_groups: int = 48
    pcm_kernel: int = 1
    norm_eps: float = NORM_EPS
    stem: int = 32
    inception: tuple[int, ...] = (16, 16, 8, 8, 4)
    magnitude_width: int = 1024
    branch_width: int = 1096
    head_width: int = 1024
    asinh_softening: tuple[float, ...] = ()
    magnitude_mean: tuple[float, ...] = ()
    magnitude_mix: tuple[tuple[float, ...], ...] = ()


class Attention(nn.Module):
    """Multi-head self-attention whose keys carry no bias (it would cancel in the softmax)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = functional.linear(x, self.qkv.weight, bias)
        qkv = qkv.view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU in between; (…, width) to (…, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Transformer block with a convolutional branch (PCM) over the grid of patch tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.width * config.mlp_ratio
        kernel, groups = config.pcm_kernel, config.pcm_groups
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, hidden)
        self.PCM = nn.Sequential(
            nn.Conv2d(width, hidden, kernel, padding=kernel // 2, groups=groups),
            nn.BatchNorm2d(hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, width, kernel, padding=kernel // 2, groups=groups),
        )

    def forward(self, x: Tensor) -> Tensor:
        local = self._convolve(x[:, 1:])
        x = x + self.attn(self.norm1(x))
        x = torch.cat((x[:, :1], x[:, 1:] + local), dim=1)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _convolve(self, tokens: Tensor) -> Tensor:
        """PCM of the patch tokens (B, side * side, width), the class token left out."""
        batch, count, width = tokens.shape
        side = round(count**0.5)
        grid = tokens.transpose(1, 2).reshape(batch, width, side, side)
        out: Tensor = self.PCM(grid).flatten(2).transpose(1, 2)
        return out


class ConvBlock(nn.Module):
    """Convolution that keeps height and width, batch normalization, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.bn(self.conv(x)))
        return out


class InceptionBlock(nn.Module):
    """Four branches side by side, `channels` each (Szegedy et al. 2015); three when not `wide`.

    The published last block owns a 5x5 branch that it never runs: its weights are in the files.
    """

    def __init__(self, channels_in: int, channels: int, *, wide: bool) -> None:
        super().__init__()
        self.wide = wide
        self.branch1 = ConvBlock(channels_in, channels, 1)
        self.branch2 = nn.Sequential(
            ConvBlock(channels_in, channels, 1), ConvBlock(channels, channels, 3)
        )
        self.branch3 = nn.Sequential(
            ConvBlock(channels_in, channels, 1), ConvBlock(channels, channels, 5)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), ConvBlock(channels_in, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.branch1(x), self.branch2(x)]
        if self.wide:
            parts.append(self.branch3(x))
        return torch.cat([*parts, self.branch4(x)], dim=1)


class InceptionMagnitude(nn.Module):
    """The Inception branch over the image and the perceptron over the magnitudes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # The published class names this layer twice; both names are in its state_dict.
        self.conv2d_init = nn.Conv2d(config.bands, config.stem, 1)
        self.magnitude_block = _perceptron(config.bands, config.magnitude_width, 5)
        self.vis_inception = nn.Sequential(
            self.conv2d_init, *_inception_layers(config), *_inception_tail(config)
        )

    def forward(self, images: Tensor, magnitudes: Tensor) -> Tensor:
        seen, measured = self.vis_inception(images), self.magnitude_block(magnitudes)
        return torch.cat((seen, measured), dim=1)


class PatchEmbed(nn.Module):
    """One token of the encoder's width for each square patch of an image."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.bands, config.width, config.patch, stride=config.patch)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return out


class AstroMAE(nn.Module):
    """Photometric redshift from a cutout and its magnitudes.

    Args:
        config: sizes and input scaling; `ModelConfig()` is the published model.

    Raises:
        ModelError: the sizes do not fit together.
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        config = config or ModelConfig()
        _check(config)
        self.config = config
        tokens = (config.image_size // config.patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.width))
        self.fc_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, config.width)
        self.inception_model = InceptionMagnitude(config)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.patch_embed = PatchEmbed(config)
        self.vit_block = _perceptron(config.width, config.branch_width, 2)
        joined = 2 * config.branch_width + config.magnitude_width
        self.concat_block = nn.Sequential(
            nn.Linear(joined, config.head_width), nn.ReLU(), nn.Linear(config.head_width, 1)
        )
        self._register_scaling(config)

    def forward(self, images: Tensor, magnitudes: Tensor) -> Tensor:
        """Predict redshifts; put the model in eval mode first, or rows of a batch mix.

        Args:
            images: (B, bands, side, side) float32, nanomaggies, ugriz.
            magnitudes: (B, bands) float32, AB magnitudes, ugriz.

        Returns:
            (B,) float32, z_phot.
        """
        images, magnitudes = self._scale(images, magnitudes)
        joined = torch.cat(
            (self._transform(images), self.inception_model(images, magnitudes)), dim=1
        )
        out: Tensor = self.concat_block(joined).squeeze(1)
        return out

    def _transform(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        x = self.blocks(x + self.pos_embed)
        pooled = x[:, 1:].mean(dim=1)
        out: Tensor = self.vit_block(self.head(self.fc_norm(pooled)))
        return out

    def _register_scaling(self, config: ModelConfig) -> None:
        # Not persistent: the published state_dict has no such entries; the config carries them.
        # device="cpu" holds under the meta device too, where `load_model` builds the model.
        for name in ("asinh_softening", "magnitude_mean", "magnitude_mix"):
            value = torch.tensor(getattr(config, name), dtype=torch.float32, device="cpu")
            self.register_buffer(f"_{name}", value, persistent=False)

    def _scale(self, images: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        softening = self.get_buffer("_asinh_softening")
        if len(softening):
            images = torch.asinh(images / softening.view(-1, 1, 1))
        if len(self.get_buffer("_magnitude_mean")):
            centred = magnitudes - self.get_buffer("_magnitude_mean")
            magnitudes = centred @ self.get_buffer("_magnitude_mix")
        return images, magnitudes


def _check(config: ModelConfig) -> None:
    """Refuse sizes that torch would refuse late, or not at all."""
    sizes = [v for k, v in asdict(config).items() if k != "norm_eps" and not isinstance(v, tuple)]
    if min(sizes + list(config.inception)) < 1 or len(config.inception) != 5:
        raise ModelError("sizes must be positive, with five Inception blocks")
    if config.image_size % config.patch or config.image_size % 8:
        raise ModelError(
            f"image_size {config.image_size} must be a multiple of 8 and of patch {config.patch}"
        )
    if config.width % config.heads or config.width % config.pcm_groups:
        raise ModelError(
            f"width must be a multiple of heads ({config.heads}) and of pcm_groups "
            f"({config.pcm_groups}), not {config.width}"
        )
    if config.pcm_kernel % 2 == 0:
        raise ModelError(f"pcm_kernel must be odd, not {config.pcm_kernel}")
    if not 0 < config.norm_eps < 1:
        raise ModelError(f"norm_eps must be a small positive number, not {config.norm_eps}")
    mix = config.magnitude_mix
    lengths = [len(v) for v in (config.asinh_softening, config.magnitude_mean, mix, *mix)]
    if any(length not in (0, config.bands) for length in lengths):
        raise ModelError(f"input scaling needs {config.bands} values, one per band")
    if bool(config.magnitude_mean) != bool(config.magnitude_mix):
        raise ModelError("magnitude_mean and magnitude_mix come together or not at all")


def _perceptron(width_in: int, width: int, layers: int) -> nn.Sequential:
    """`layers` linear layers of `width` with ReLU between, none after the last."""
    parts: list[nn.Module] = [nn.Linear(width_in, width)]
    for _ in range(layers - 1):
        parts += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*parts)


def _inception_layers(config: ModelConfig) -> list[nn.Module]:
    """Pool, two blocks, pool, two blocks, pool, and the narrow fifth block."""
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    channels = config.stem
    for number, width in enumerate(config.inception):
        layers.append(InceptionBlock(channels, width, wide=number < 4))
        channels = 4 * width
        if number in (1, 3):
            layers.append(nn.AvgPool2d(2))
    return layers


def _inception_tail(config: ModelConfig) -> list[nn.Module]:
    flat = 3 * config.inception[-1] * (config.image_size // 8) ** 2
    return [nn.Flatten(), *_perceptron(flat, config.branch_width, 2)]
