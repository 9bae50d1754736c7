"""AstroMAE with its affine layers folded into each other: the same function, fewer operations.

A trained network normalises with constants: BatchNorm is then an affine map, which the convolution
before it takes in, and so is the scale and shift behind LayerNorm, for the linear layer after it.
Linear layers with nothing between them become one. All of it is done in float64 and stored in
float32, so predictions differ from the plain model's by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lambda_worker.model import AstroMAE, Attention, Block, ConvBlock, InceptionBlock, ModelConfig

Affine = tuple[Tensor, Tensor]
"""Weight and bias of a linear layer or a convolution; float64 once anything is folded in."""

# What a group of a convolution needs for the kernels that fill their registers: with fewer outputs
# it is slower, and the last bits of a row's result depend on the number of rows.
GROUP_INPUTS, GROUP_OUTPUTS = 8, 16


class Linear(nn.Module):
    """`nn.Linear` without gradient, made of an `Affine`; it takes no time to draw weights."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.weight, self.bias = (_constant(value) for value in affine)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Conv(nn.Module):
    """`nn.Conv2d` that keeps the image's size, made of an `Affine`."""

    def __init__(self, affine: Affine, groups: int = 1) -> None:
        super().__init__()
        self.weight, self.bias = (_constant(value) for value in affine)
        self.groups, self.padding = groups, affine[0].shape[-1] // 2

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(
            x, self.weight, self.bias, padding=self.padding, groups=self.groups
        )


class Attend(nn.Module):
    """Softmax attention between the tokens of an image, from queries scaled beforehand."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, tokens, 3 * width) to (B, tokens, width)."""
        batch, tokens, width = qkv.shape
        parts = qkv.view(batch, tokens, 3, self.heads, width // 3 // self.heads)
        # One copy for all three, where `matmul` would make one for each.
        query, key, value = parts.permute(2, 0, 3, 1, 4).contiguous()
        mixed = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
        out: Tensor = mixed.transpose(1, 2).reshape(batch, tokens, width // 3)
        return out


class FoldedBlock(nn.Module):
    """A transformer block with its convolutional branch; see `model.Block`."""

    def __init__(self, block: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(block, Block)
        self.side = config.image_size // config.patch
        self.norm1, self.norm2 = _bare(block.norm1), _bare(block.norm2)
        self.qkv, self.proj = _attention(block)
        self.attend = Attend(config.heads)
        self.fc1 = Linear(_after_norm(block.norm2, _affine(block.mlp.fc1)))
        self.fc2 = Linear(_affine(block.mlp.fc2))
        widen, norm, _, narrow = block.PCM
        self.widen = _grouped(_with_norm(widen, norm), config)
        self.narrow = _grouped(_affine(narrow), config)

    def forward(self, x: Tensor) -> Tensor:
        local = self._convolve(x[:, 1:])
        x = x + self.proj(self.attend(self.qkv(self.norm1(x))))
        x = torch.cat((x[:, :1], x[:, 1:] + local), dim=1)
        hidden = functional.gelu(self.fc1(self.norm2(x)))
        out: Tensor = x + self.fc2(hidden)
        return out

    def _convolve(self, tokens: Tensor) -> Tensor:
        batch, _, width = tokens.shape
        grid = tokens.transpose(1, 2).reshape(batch, width, self.side, self.side)
        out: Tensor = self.narrow(functional.silu(self.widen(grid), inplace=True))
        return out.flatten(2).transpose(1, 2)


class FoldedInception(nn.Module):
    """An Inception block; the 1x1 convolutions that open its branches are one."""

    def __init__(self, block: InceptionBlock) -> None:
        super().__init__()
        after = [block.branch2, block.branch3] if block.wide else [block.branch2]
        first = [_folded(block.branch1), *(_folded(branch[0]) for branch in after)]
        self.channels = len(first[0][1])
        self.first = Conv((_stack(w for w, _ in first), _stack(b for _, b in first)))
        self.after = nn.ModuleList(Conv(_folded(branch[1])) for branch in after)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.pooled = Conv(_folded(block.branch4[1]))

    def forward(self, x: Tensor) -> Tensor:
        done, *rest = torch.split(
            functional.relu(self.first(x), inplace=True), self.channels, dim=1
        )
        parts = [done, *(conv(part) for conv, part in zip(self.after, rest, strict=True))]
        parts.append(self.pooled(self.pool(x)))
        return functional.relu(torch.cat(parts, dim=1), inplace=True)


class Folded(nn.Module):
    """What `fold` returns: an AstroMAE for prediction only, with its own layers and names."""

    def __init__(self, model: AstroMAE) -> None:
        super().__init__()
        self.config = config = model.config
        self.softening = _constant(torch.tensor(config.asinh_softening).view(-1, 1, 1))
        self._embed(model)
        self.blocks = nn.ModuleList(FoldedBlock(block, config) for block in model.blocks)
        stem, _, *inception = list(model.inception_model.vis_inception)[:-4]
        self.stem = Conv(_affine(stem))
        self.inception = nn.ModuleList(
            FoldedInception(layer) if isinstance(layer, InceptionBlock) else nn.AvgPool2d(2)
            for layer in inception
        )
        self._join(model)

    def _embed(self, model: AstroMAE) -> None:
        weight, bias = _affine(model.patch_embed.proj)
        position = _double(model.pos_embed)[0]
        self.patches = Linear((weight.flatten(1), torch.zeros_like(bias)))
        self.position = _constant(position[1:] + bias)
        self.cls = _constant((_double(model.cls_token)[0] + position[:1]).unsqueeze(0))

    def _join(self, model: AstroMAE) -> None:
        """The ends of the three branches, which run into one linear layer together."""
        branches = model.inception_model
        opened, _, vit_end = model.vit_block
        head = _merge(_after_norm(model.fc_norm, _affine(model.head)), _affine(opened))
        self.norm = _bare(model.fc_norm)
        self.vit = Linear(head)
        flat, _, inception_end = list(branches.vis_inception)[-3:]
        self.flat = Linear(_affine(flat))
        *magnitudes, magnitude_end = list(branches.magnitude_block)[::2]  # ReLU between
        first, *more = (_affine(layer) for layer in magnitudes)
        self.magnitudes = nn.ModuleList(map(Linear, [_scaled(first, model.config), *more]))
        joint, _, last = model.concat_block
        weight, bias = _affine(joint)
        ends = [_affine(end) for end in (vit_end, inception_end, magnitude_end)]
        parts = torch.split(weight, [len(b) for _, b in ends], dim=1)
        merged = [_merge(end, (part, bias * 0)) for end, part in zip(ends, parts, strict=True)]
        weights, biases = zip(*merged, strict=True)
        self.joint = Linear((torch.cat(weights, dim=1), bias + sum(biases)))
        self.last = Linear(_affine(last))

    def forward(self, images: Tensor, magnitudes: Tensor) -> Tensor:
        """As `AstroMAE.forward`."""
        if self.softening.numel():
            images = torch.asinh(images / self.softening)
        for layer in self.magnitudes:
            magnitudes = torch.relu(layer(magnitudes))
        joined = torch.cat((self._transform(images), self._see(images), magnitudes), dim=1)
        out: Tensor = self.last(torch.relu(self.joint(joined))).squeeze(1)
        return out

    def _transform(self, images: Tensor) -> Tensor:
        bands, patch = self.config.bands, self.config.patch
        side = self.config.image_size // patch
        cut = images.reshape(-1, bands, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        patches = self.patches(cut.reshape(-1, side * side, bands * patch * patch))
        x = torch.cat((self.cls.expand(images.shape[0], -1, -1), patches + self.position), dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.vit(self.norm(x[:, 1:].mean(dim=1)))
        return torch.relu(out)

    def _see(self, images: Tensor) -> Tensor:
        # Pooling and a 1x1 convolution commute, and there are fewer pixels after the pool.
        x = self.stem(functional.avg_pool2d(images, 2))
        for layer in self.inception:
            x = layer(x)
        out: Tensor = self.flat(x.flatten(1))
        return torch.relu(out)


def fold(model: AstroMAE) -> Folded:
    """Make the equivalent of a trained model, for prediction on the CPU.

    Args:
        model: of any sizes. The layers that nothing is folded into share its memory.

    Returns:
        A module with the same `forward`, in eval mode and without gradients. Its parameters have
        names of their own: keep models as AstroMAE's files.
    """
    with torch.no_grad():
        return Folded(model).eval()


def _double(value: Tensor) -> Tensor:
    return value.detach().double()


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.float().contiguous(), requires_grad=False)


def _affine(layer: nn.Module) -> Affine:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


def _stack(values: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(values))


def _bare(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The norm without its scale and shift, which the linear layer after it takes in."""
    # Of scale 1, not without one: for that, torch has a slower kernel.
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps).requires_grad_(False)


def _merge(first: Affine, then: Affine) -> Affine:
    """`then` after `first`, as one layer."""
    (weight, bias), (outer, shift) = first, then
    return _double(outer) @ _double(weight), _double(outer) @ _double(bias) + shift


def _after_norm(norm: nn.LayerNorm, layer: Affine) -> Affine:
    """A linear layer that also does the scale and shift of the norm before it."""
    weight, bias = layer
    return weight * _double(norm.weight), _double(weight) @ _double(norm.bias) + bias


def _with_norm(conv: nn.Module, norm: nn.Module) -> Affine:
    """A convolution that also does the BatchNorm behind it."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = _affine(conv)
    scale = _double(norm.weight) / (_double(norm.running_var) + norm.eps).sqrt()
    shift = _double(norm.bias) - _double(norm.running_mean) * scale
    return weight * scale.view(-1, 1, 1, 1), bias * scale + shift


def _folded(block: nn.Module) -> Affine:
    assert isinstance(block, ConvBlock)
    return _with_norm(block.conv, block.bn)


def _attention(block: Block) -> tuple[Linear, Linear]:
    """The layers qkv and proj: queries scaled, and constants kept out of keys and values.

    A constant in the keys adds the same to all scores of a query, which the softmax undoes; one in
    the values passes through it, since its weights add up to 1, and joins the bias of `proj`.
    """
    attention: Attention = block.attn
    width = len(attention.q_bias)
    biases = (attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias)
    bias = torch.cat([_double(value) for value in biases])
    weight, bias = _after_norm(block.norm1, (attention.qkv.weight.detach(), bias))
    scale = (width // attention.heads) ** -0.5
    proj, shift = _affine(attention.proj)
    out = Linear((proj, shift + _double(proj) @ bias[2 * width :]))
    weight[:width] *= scale
    bias[:width] *= scale
    bias[width:] = 0
    return Linear((weight, bias)), out


def _grouped(conv: Affine, config: ModelConfig) -> Conv:
    """A grouped convolution with neighbouring groups joined, zeros between them.

    To multiply the zeros, too, costs less than a group that leaves most of a register empty.
    """
    weight, bias = conv
    groups = config.pcm_groups
    outputs, inputs = len(weight) // groups, weight.shape[1]
    joined = 1
    while groups % (2 * joined) == 0 and not (
        inputs * joined >= GROUP_INPUTS and outputs * joined >= GROUP_OUTPUTS
    ):
        joined *= 2
    # (joined groups, groups in each, outputs, inputs, kernel)
    parts = weight.view(groups // joined, joined, outputs, inputs, *weight.shape[2:])
    wide = weight.new_zeros(groups // joined, joined, outputs, joined, *parts.shape[3:])
    for each in range(joined):
        wide[:, each, :, each] = parts[:, each]
    wide = wide.reshape(len(weight), joined * inputs, *weight.shape[2:])
    return Conv((wide, bias), groups // joined)


def _scaled(layer: Affine, config: ModelConfig) -> Affine:
    """The first layer of the magnitudes' branch, with the scaling of its input in it."""
    if not config.magnitude_mean:
        return layer
    # What the plain model computes with: float32.
    mean, mix = (torch.tensor(v).double() for v in (config.magnitude_mean, config.magnitude_mix))
    return _merge((mix.T, -(mean @ mix)), layer)
