"""Parameter counts of published CIFAR-10 networks, derived by hand from a paper's tables or published code.

The counts do not use the package, so that its networks can be compared with them.
"""

from __future__ import annotations


def conv(i: int, o: int, k: int = 3, *, bias: bool = True) -> int:
    return i * o * k * k + (o if bias else 0)


def linear(i: int, o: int, *, bias: bool = True) -> int:
    return i * o + (o if bias else 0)


def unet(*, num_blocks: int, attention_resolutions: tuple[int, ...], emb_outputs: int, out_channels: int) -> int:
    """Count the parameters of Ho et al. (2020), appendix B, with 128 channels times 1, 2, 2, 2, or of Nichol and
    Dhariwal's (2021) variant (openai/improved-diffusion, unet.py).

    Args:
        num_blocks: residual blocks per encoder level.
        attention_resolutions: resolutions with attention; the middle block always has it.
        emb_outputs: outputs per channel of a block's projection of the embedding: 1 (added), or 2 (scale and shift).
        out_channels: output channels.
    """

    def residual(i: int, o: int) -> int:
        return 2 * i + conv(i, o) + linear(512, emb_outputs * o) + 2 * o + conv(o, o) + (conv(i, o, 1) if i != o else 0)

    def attend(c: int) -> int:
        return 2 * c + 4 * linear(c, c)

    def block(i: int, o: int, side: int) -> int:
        return residual(i, o) + (attend(o) if side in attention_resolutions else 0)

    levels = ((32, 128), (16, 256), (8, 256), (4, 256))
    count = linear(128, 512) + linear(512, 512) + conv(3, 128)
    skips = [128]  # channels of the encoder outputs, which the decoder receives in reverse order
    for side, width in levels:
        for _ in range(num_blocks):
            count += block(skips[-1], width, side)
            skips.append(width)
        if side > 4:
            count += conv(width, width)
            skips.append(width)
    count += 2 * residual(256, 256) + attend(256)
    current = 256
    for side, width in reversed(levels):
        for _ in range(num_blocks + 1):
            count += block(current + skips.pop(), width, side)
            current = width
        if side < 32:
            count += conv(width, width)
    return count + 2 * 128 + conv(128, out_channels)


def vdm(*, emb_bias: bool = False, noise_dim: int = 129) -> int:
    """Count the parameters of Kingma et al. (2021): google-research/vdm, model_vdm.py and configs/cifar10.py, with 32
    encoder blocks and 33 decoder blocks at one resolution.

    Args:
        emb_bias: whether a block's projection of the embedding has a bias.
        noise_dim: number of noise-level features; in the published code 128 and a column of zeros.
    """
    projection = linear(512, 128, bias=emb_bias)

    def block(i: int) -> int:
        return 2 * i + conv(i, 128) + projection + 2 * 128 + conv(128, 128) + (conv(i, 128, 1) if i > 128 else 0)

    in_channels = 3 * (1 + 2 * 2)  # the image, and sine and cosine at two frequencies
    ends = conv(in_channels, 128) + linear(noise_dim, 512) + linear(512, 512) + 2 * 128 + conv(128, 3)
    middle = 2 * block(128) + 2 * 128 + 4 * linear(128, 128)
    return ends + 32 * block(128) + middle + 33 * block(256)


def vdvae() -> int:
    """Count the parameters of Child (2021) with the published config (openai/vdvae, hps.py).

    The width is 384, and a quarter of it inside a block. The latents z have 16 channels. The encoder is
    "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3" and the decoder is "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21".
    Convolutions at resolution 1x1 have 1x1 kernels.
    """
    width, inner, z, maps = 384, 96, 16, 100
    up, down = 11 + 1 + 6 + 1 + 6 + 1 + 3 + 1, 1 + 2 + 1 + 5 + 1 + 10 + 1 + 21

    def block(i: int, o: int, k: int) -> int:
        return conv(i, inner, 1) + 2 * conv(inner, inner, k) + conv(inner, o, 1)

    def layer(k: int) -> int:
        posterior, prior = block(2 * width, 2 * z, k), block(width, 2 * z + width, k)
        return posterior + prior + conv(z, width, 1) + block(width, width, k)

    encoder = conv(3, width) + up * block(width, width, 3) + 3 * block(width, width, 1)
    starts = width * (32**2 + 16**2 + 8**2 + 4**2 + 1)
    return encoder + down * layer(3) + layer(1) + starts + 2 * width + conv(width, maps, 1)


def pixelcnnpp() -> int:
    """Count the parameters of Salimans et al. (2017) with the published code (openai/pixel-cnn, model.py).

    There are 160 filters and 5 blocks per level. Convolutions have 2x3 kernels in the vertical stream and 2x2 in
    the horizontal one, and weights, gains and biases. An output pixel has 10 components of 10 parameters.
    """
    width = 160

    def layer(i: int, o: int, size: int) -> int:
        return i * o * size + 2 * o

    def stream(size: int, shortcuts: int) -> int:
        plain = layer(2 * width, width, size) + layer(2 * width, 2 * width, size)
        down = 15 * (plain + (layer(2 * shortcuts * width, width, 1) if shortcuts else 0))
        up = 17 * (plain + layer(2 * (shortcuts + 1) * width, width, 1))
        return down + up + 4 * layer(width, width, size)

    vertical, horizontal = layer(4, width, 2 * 3), layer(4, width, 3) + layer(4, width, 2)
    return vertical + stream(6, 0) + horizontal + stream(4, 1) + layer(width, 100, 1)


def igebm(*, bias: bool = False) -> int:
    """Count the parameters of ResNet32Large of Du and Mordatch (2019): openai/ebm_code_release, models.py.

    The layers are a convolution from 3 to 128 channels, three blocks each of 128, 256 and 512 channels, and a linear
    layer. A block has two convolutions, and a 3x3 shortcut if the number of channels changes.

    Args:
        bias: whether layers other than shortcuts have a bias.
    """
    stages = (128, 128), (128, 256), (256, 512)
    count = conv(3, 128, bias=bias) + linear(512, 1, bias=bias)
    for i, o in stages:
        count += conv(i, o, bias=bias) + 5 * conv(o, o, bias=bias)
        count += conv(i, o, bias=False) if i != o else 0
    return count


def dcgan() -> dict[str, int]:
    """Count the parameters of Miyato et al. (2018), table 3 with M_g = 4. No count is published. Batch norm has two
    parameters per channel."""
    ups = sum(conv(i, o, 4) + 2 * o for i, o in ((512, 256), (256, 128), (128, 64)))
    down = ((3, 64, 3), (64, 64, 4), (64, 128, 3), (128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3))
    return {
        "generator": linear(128, 512 * 16) + ups + conv(64, 3),
        "discriminator": sum(conv(*layer) for layer in down) + linear(512 * 16, 1),
    }


def sngan(*, last_bias: bool = False) -> dict[str, int]:
    """Count the parameters of Miyato et al. (2018), table 4 and figure 8. No count is published. Shortcuts of
    resampling blocks have a 1x1 convolution, and the last layer of the discriminator has no bias, as in the published
    code (pfnet-research/sngan_projection, gen_models and dis_models)."""
    up = 2 * conv(256, 256) + conv(256, 256, 1) + 2 * 2 * 256
    first, down = conv(3, 128) + conv(128, 128) + conv(3, 128, 1), 2 * conv(128, 128) + conv(128, 128, 1)
    return {
        "generator": linear(128, 256 * 16) + 3 * up + 2 * 256 + conv(256, 3),
        "discriminator": first + down + 2 * 2 * conv(128, 128) + linear(128, 1, bias=last_bias),
    }


def r3gan() -> dict[str, int]:
    """Count the parameters of the published code of Huang et al. (2024), preset CIFAR10 with 10 classes: 4 stages of
    768 channels, 2 blocks each, expansion 2, 96 groups, latents of 64, label embeddings of 64 and 768."""
    wide = 2 * 768
    block = conv(768, wide, 1) + wide * (wide // 96) * 9 + wide + conv(wide, 768, 1, bias=False)
    return {
        "generator": 8 * block + 768 * 16 + (64 + 64) * 768 + 10 * 64 + 768 * 3,
        "discriminator": 8 * block + 3 * 768 + 768 * 16 + 768 * 768 + 10 * 768,
    }
