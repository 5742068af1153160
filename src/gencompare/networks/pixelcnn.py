"""The network of PixelCNN++: shifted convolutions, which see only the pixels before each pixel in raster order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts

Rows = dict[str, Tensor]
"""What the next row of an image needs from the rows above it, by the name of the layer: each (n, channels, rows, W)."""

ROWS_ABOVE = 2
"""Number of rows that the first convolutions of a stream reach above the row of a pixel."""
INIT_STD = 0.05
"""Standard deviation of the directions of weights and of label embeddings at initialisation."""
GATE_INIT_SCALE = 0.1
"""Initial norm of the weights before the gate of a `GatedBlock`, whose output is then small."""


class WeightNormConv(nn.Module):
    r"""A convolution with the weights :math:`w = g \, v / |v|` for each output channel.

    Salimans and Kingma (2016), "Weight normalization", eq. 2, https://arxiv.org/abs/1602.07868. They initialise g and
    the bias from the statistics of the first batch, so that outputs have mean 0 and variance 1. Here g starts at
    ``init_scale`` and the bias at 0, which gives a similar scale for inputs of unit scale, and does not depend on data.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: height and width of the kernel.
        stride: distance of the positions of the kernel, in both directions.
        init_scale: initial value of g.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.direction = nn.Parameter(INIT_STD * torch.randn(out_channels, in_channels, *kernel))
        self.gain = nn.Parameter(torch.full((out_channels,), init_scale))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    @property
    def weight(self) -> Tensor:
        """w, (out_channels, in_channels, height, width)."""
        norm = self.direction.flatten(1).norm(dim=1)
        return self.direction * (self.gain / norm)[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride)


class ShiftedConv(WeightNormConv):
    """A convolution whose output at a position depends on rows up to this one.

    With ``centred``, the kernel covers columns on both sides; otherwise it covers columns up to the present one.
    Zeros surround the input. The output is then shifted down by ``down`` rows and to the right by ``right`` columns.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: height and width of the kernel.
        centred: whether the kernel covers columns on both sides.
        down: rows by which the output is shifted.
        right: columns by which the output is shifted; 0 if centred.
        stride: distance of the positions of the kernel, in both directions.
        init_scale: see `WeightNormConv`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        *,
        centred: bool,
        down: int = 0,
        right: int = 0,
        stride: int = 1,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, init_scale=init_scale)
        height, width = kernel
        self.rows_above = height - 1 + down
        # Negative padding crops.
        self.columns = (width // 2, width // 2) if centred else (width - 1 + right, -right)
        self.down = down
        self.name = ""
        """Name of this layer in `Rows`, set by `Stream`."""

    def forward(self, x: Tensor, above: Rows | None = None, below: Rows | None = None) -> Tensor:
        """Apply the convolution to an image, or to a row, given the rows ``above`` it.

        Args:
            x: (n, in_channels, H, W), where H = 1 if ``above`` is given.
            above: what the previous row left for this one; None for a whole image.
            below: receives what this row leaves for the next.
        """
        if above is None or below is None:
            return super().forward(F.pad(x, (*self.columns, self.rows_above, -self.down)))
        return self.last_row(self.with_rows_above(x, above, below))

    def last_row(self, x: Tensor) -> Tensor:
        """Compute the last row of the output, (n, out_channels, 1, W), from the last rows of the input."""
        return super().forward(F.pad(x[:, :, -1 - self.rows_above :], (*self.columns, 0, -self.down)))

    def with_rows_above(self, x: Tensor, above: Rows, below: Rows) -> Tensor:
        """Return a row with the rows above it, and keep the last ones for the next row."""
        top = above.get(self.name)
        if top is None:
            top = x.new_zeros(*x.shape[:2], self.rows_above, x.shape[3])
        x = torch.cat([top, x], dim=2)
        below[self.name] = x[:, :, 1:]
        return x


class Upsample(nn.Module):
    """A transposed `ShiftedConv` of stride 2: row i becomes the rows 2i and 2i + 1.

    Shapes: (n, channels, H, W) -> (n, channels, 2 H, 2 W).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = WeightNormConv(channels, channels, (2, width))
        self.padding = width // 2 if width % 2 else 0

    def forward(self, x: Tensor) -> Tensor:
        # Output column 2j + k - padding is the sum over input columns j and kernel columns k.
        weight = self.conv.weight.transpose(0, 1)
        padding = (0, self.padding)
        return F.conv_transpose2d(x, weight, self.conv.bias, 2, padding, output_padding=padding)


def concat_elu(x: Tensor) -> Tensor:
    """Compute ELU of x and of -x, (n, 2 channels, H, W)."""
    return F.elu(torch.cat([x, -x], dim=1))


class GatedBlock(nn.Module):
    r"""A gated residual block: :math:`h + a \, S(b)`, where (a, b) is a function of h and the logistic function is S.

    .. math:: (a, b) = \mathrm{conv}(\mathrm{dropout}(f(\mathrm{conv}(f(h)) + U f(s)))) + V_c

    with the concatenated ELU f, features s of a shortcut, and a vector :math:`V_c` for class c. Salimans et al. (2017),
    section 2.5; van den Oord et al. (2016), "Conditional image generation with PixelCNN decoders", eq. 4,
    https://arxiv.org/abs/1606.05328.

    Args:
        channels: channels of h.
        shortcut_channels: channels of s, 0 for none.
        kernel: height and width of the kernels.
        centred: see `ShiftedConv`.
        num_classes: number of classes, 0 for none.
        dropout: probability of dropping a feature.
    """

    def __init__(
        self,
        channels: int,
        shortcut_channels: int,
        kernel: tuple[int, int],
        *,
        centred: bool,
        num_classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv = ShiftedConv(2 * channels, channels, kernel, centred=centred)
        self.shortcut = WeightNormConv(2 * shortcut_channels, channels) if shortcut_channels else None
        self.dropout = nn.Dropout(dropout)
        self.gated = ShiftedConv(2 * channels, 2 * channels, kernel, centred=centred, init_scale=GATE_INIT_SCALE)
        self.labels = nn.Embedding(num_classes, 2 * channels) if num_classes else None
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=INIT_STD)

    def forward(
        self, h: Tensor, shortcut: Tensor | None, label: Tensor | None, above: Rows | None, below: Rows | None
    ) -> Tensor:
        y = self.conv(concat_elu(h), above, below)
        if self.shortcut is not None:
            assert shortcut is not None
            y = y + self.shortcut(concat_elu(shortcut))
        y = self.gated(self.dropout(concat_elu(y)), above, below)
        if self.labels is not None:
            y = y + self.labels(label)[:, :, None, None]
        a, b = y.chunk(2, dim=1)
        return h + a * torch.sigmoid(b)


class Stream(nn.Module):
    """One of the two streams of a `PixelCNN`: a U-Net of `GatedBlock` modules with shifted convolutions.

    Level l has rows and columns of 2^l pixels. The first convolutions shift their outputs, so that no feature depends
    on its own pixel or on later ones.

    Args:
        stem: the first convolutions, whose outputs are added.
        channels: features of a position.
        width: width of the kernels, of height 2; odd widths are centred.
        num_levels: number of resolutions.
        num_blocks: blocks per level on the way down; on the way up, all levels but the coarsest have one more.
        receives_features: whether all blocks receive the features of another stream.
        num_classes: number of classes, 0 for none.
        dropout: probability of dropping a feature.
    """

    def __init__(
        self,
        stem: Sequence[ShiftedConv],
        *,
        channels: int,
        width: int,
        num_levels: int,
        num_blocks: int,
        receives_features: bool,
        num_classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        kernel, centred = (2, width), width % 2 == 1
        other = channels if receives_features else 0

        def blocks(count: int, shortcut_channels: int) -> nn.ModuleList:
            return nn.ModuleList(
                GatedBlock(
                    channels, shortcut_channels, kernel, centred=centred, num_classes=num_classes, dropout=dropout
                )
                for _ in range(count)
            )

        levels = range(num_levels)
        self.stem = nn.ModuleList(stem)
        self.down_blocks = nn.ModuleList(blocks(num_blocks, other) for _ in levels)
        self.up_blocks = nn.ModuleList(
            blocks(num_blocks + (level < num_levels - 1), channels + other) for level in levels
        )
        self.downsample = nn.ModuleList(
            ShiftedConv(channels, channels, kernel, centred=centred, stride=2) for _ in levels[1:]
        )
        self.upsample = nn.ModuleList(Upsample(channels, width) for _ in levels[1:])
        for name, module in self.named_modules():
            if isinstance(module, ShiftedConv):
                module.name = name

    def forward(
        self,
        x: Tensor,
        features: Sequence[Tensor] = (),
        label: Tensor | None = None,
        *,
        row: int | None = None,
        num_columns: int | None = None,
        above: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[Tensor], Rows]:
        """Process whole images, or the first columns of one row.

        A row of level l is computed with the first of its 2^l rows of pixels, and kept for the others.

        Args:
            x: images (n, C + 1, H, W) from `with_ones`; or `ROWS_ABOVE` rows and the row ``row``.
            features: outputs of all blocks of the other stream, in order.
            label: class of each image, (n,), or None.
            row: index of the row; None for whole images.
            num_columns: number of columns of a row to compute, a multiple of 2^(num_levels - 1).
            above: what the previous row returned; empty for the first row.

        Returns:
            The outputs of all blocks, in order, and, for a row, what the next row needs.
        """
        last = len(self.downsample)
        if row is None:
            rows, below, coarsest = None, None, last
            h = torch.stack([conv(x) for conv in self.stem]).sum(0)
        else:
            width = x.shape[3]
            kept = width if num_columns is None else num_columns
            features = [_first_columns(each, kept, width) for each in features]
            rows = {name: _first_columns(each, kept, width) for name, each in (above or {}).items()}
            below, coarsest = dict(rows), next((k for k in range(last) if row >> k & 1), last)
            h = torch.stack([conv.last_row(x) for conv in self.stem]).sum(0)[..., :kept]  # type: ignore[operator]
        others, outputs, skips = iter(features), list[Tensor](), [h]
        for level in range(coarsest + 1):
            for block in self.down_blocks[level]:  # type: ignore[attr-defined]
                skips.append(block(skips[-1], next(others, None), label, rows, below))
                outputs.append(skips[-1])
            if level < coarsest:
                skips.append(self.downsample[level](skips[-1], rows, below))
        if rows is None or below is None or coarsest == last:
            h = skips.pop()
        else:
            # The second of two rows that share a row of the next level.
            self.downsample[coarsest].with_rows_above(skips[-1], rows, below)  # type: ignore[operator]
            h = rows[f"upsample.{coarsest}"]
        for level in reversed(range(coarsest + 1)):
            for block in self.up_blocks[level]:  # type: ignore[attr-defined]
                other = next(others, None)
                shortcut = skips.pop() if other is None else torch.cat([other, skips.pop()], dim=1)
                h = block(h, shortcut, label, rows, below)
                outputs.append(h)
            if level:
                h = self.upsample[level - 1](h)
                if below is not None:
                    h, below[f"upsample.{level - 1}"] = h.chunk(2, dim=2)
        return outputs, below or {}


def with_ones(x: Tensor) -> Tensor:
    """Add a channel of ones to images, which tells pixels from the zeros around the image."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def _first_columns(x: Tensor, num_columns: int, width: int) -> Tensor:
    """Return the columns of a feature map that belong to the first columns of images of the given width."""
    return x[..., : x.shape[-1] * num_columns // width]


class PixelCNN(nn.Module):
    r"""The causal network of PixelCNN++: the output at a pixel is a function of the pixels before it in raster order.

    Salimans et al. (2017), "PixelCNN++: Improving the PixelCNN with discretized logistic mixture likelihood and other
    modifications", sections 2.3 to 2.5, https://arxiv.org/abs/1701.05517. The vertical stream sees the rows above, and
    the horizontal stream also the pixels to the left. There is no blind spot: the vertical stream feeds the horizontal
    one (van den Oord et al. 2016, section 2.2). Each stream is a U-Net whose convolutions are shifted, with shortcuts
    between layers of the same resolution. Weights are normalised; the initialisation differs from the paper's, see
    `WeightNormConv`. The first convolutions have their bias also where a shift leaves no input (in the published code,
    https://github.com/openai/pixel-cnn, their output is 0 there).

    Shapes: x (n, C, H, W), label (n,) -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x; H and W must be multiples of 2^(num_levels - 1).
        out_channels: channels of the output.
        num_classes: number of classes, 0 for none.
        channels: features of a position.
        num_levels: number of resolutions; the resolution halves between levels.
        num_blocks: residual blocks per level.
        dropout: probability of dropping a feature inside a block.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        num_classes: int = 0,
        *,
        channels: int = 160,
        num_levels: int = 3,
        num_blocks: int = 5,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_counts("model.network", channels=channels, num_levels=num_levels, num_blocks=num_blocks)
        self.size_multiple = 2 ** (num_levels - 1)
        in_channels, height, width = shape
        if height % self.size_multiple or width % self.size_multiple:
            raise UserError(
                f"A PixelCNN with num_levels={num_levels} needs images whose sides are multiples of"
                f" {self.size_multiple}, not {height}x{width}: use a smaller model.network.num_levels."
            )
        if not 0 <= dropout < 1:
            raise UserError(f"model.network.dropout={dropout} must be at least 0 and below 1.")

        def stem(kernel: tuple[int, int], centred: bool, down: int = 0, right: int = 0) -> ShiftedConv:
            return ShiftedConv(in_channels + 1, channels, kernel, centred=centred, down=down, right=right)

        def stream(width: int, *stem: ShiftedConv, receives_features: bool) -> Stream:
            return Stream(
                stem,
                channels=channels,
                width=width,
                num_levels=num_levels,
                num_blocks=num_blocks,
                receives_features=receives_features,
                num_classes=num_classes,
                dropout=dropout,
            )

        self.vertical = stream(3, stem((2, 3), True, down=1), receives_features=False)
        self.horizontal = stream(2, stem((1, 3), True, down=1), stem((2, 1), False, right=1), receives_features=True)
        self.out = WeightNormConv(channels, out_channels)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = with_ones(x)
        features, _ = self.vertical(x, label=label)
        outputs, _ = self.horizontal(x, features, label)
        return self.out(F.elu(outputs[-1]))

    def raster_scan(
        self, x: Tensor, label: Tensor | None = None, *, first_row: int = 0
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the output at each pixel from ``first_row`` on, in raster order, as (row, column, (n, channels, 1, 1)).

        The output is that of `forward`, up to rounding, for the values that ``x`` (n, C, H, W) has at that moment:
        the caller may set a pixel before the output at the next one is computed. The vertical stream is computed once
        per row, and the horizontal one once per pixel, for one row of pixels and up to the column of the pixel; both
        keep what they need of the rows above.
        """
        above_vertical, above_horizontal, width = Rows(), Rows(), x.shape[3]
        for row in range(x.shape[2]):
            features, above_vertical = self.vertical(_window(x, row), label=label, row=row, above=above_vertical)
            below = Rows()
            for column in range(width) if row >= first_row else [width - 1]:
                num_columns = (column // self.size_multiple + 1) * self.size_multiple
                outputs, below = self.horizontal(
                    _window(x, row), features, label, row=row, num_columns=num_columns, above=above_horizontal
                )
                if row >= first_row:
                    yield row, column, self.out(F.elu(outputs[-1][..., column : column + 1]))
            above_horizontal = below


def _window(x: Tensor, row: int) -> Tensor:
    """Return the row of images and `ROWS_ABOVE` rows above it, with the channel of ones."""
    first = max(0, row - ROWS_ABOVE)
    return F.pad(with_ones(x[:, :, first : row + 1]), (0, 0, first + ROWS_ABOVE - row, 0))
