"""What a denoising network is told beside the noisy image and its noise level, for every network alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.embeddings import LabelEmbedding


class Conditions(nn.Module):
    r"""Class, precomputed embedding and low-resolution image of each row, as far as a network is made for them.

    - ``cond["label"]`` (n,) int64: a learned vector a class is added to the embedding e of the noise level. Index
      ``num_classes`` means no label.
    - ``cond["embedding"]`` (n, embedding_dim) float: W c is added to e. W c has no constant, so c = 0 means no
      embedding, as it does where guidance drops it.
    - ``cond["low_res"]`` (n, low_res, h, w) float in [-1, 1]: resized to the image by bilinear interpolation and laid
      beside it as further channels (Nichol and Dhariwal 2021, "Improved denoising diffusion probabilistic models";
      Saharia et al. 2021, "Image super-resolution via iterative refinement", section 2.4). h x w may be any size; a row
      of noughts means no image.
    - ``cond["augment"]`` (n, augment_dim) float: W a is added to the features from which e is made, where it says how a
      training image was moved (Karras et al. 2022, "Elucidating the design space of diffusion-based generative models",
      appendix F.2). Without it nothing was moved, a = 0.

    Entries of ``cond`` that the network was not made for are not looked at; any other that is missing is a `UserError`.

    Args:
        emb_dim: length of the network's embedding e.
        num_classes: 0 for none.
        low_res: channels of the low-resolution image, 0 for none.
        embedding_dim: length of the precomputed embedding, 0 for none.
        augment_dim: length of what is said of an augmented image, 0 for none.
        noise_dim: length of the features of the noise level from which e is made.
    """

    def __init__(
        self,
        emb_dim: int,
        num_classes: int = 0,
        *,
        low_res: int = 0,
        embedding_dim: int = 0,
        augment_dim: int = 0,
        noise_dim: int = 0,
    ) -> None:
        super().__init__()
        if min(num_classes, low_res, embedding_dim, augment_dim) < 0:
            raise UserError(
                f"low_res={low_res}, embedding_dim={embedding_dim} and augment_dim={augment_dim} of the network count"
                " channels and features: give 0 for none, or a positive number."
            )
        self.low_res, self.embedding_dim = low_res, embedding_dim
        self.label = LabelEmbedding(num_classes, emb_dim) if num_classes else None
        self.embedding = nn.Linear(embedding_dim, emb_dim, bias=False) if embedding_dim else None
        if self.embedding is not None:
            # As loud as a label, where the given features have unit variance.
            nn.init.normal_(self.embedding.weight, std=0.2 * embedding_dim**-0.5)
        self.augment = nn.Linear(augment_dim, noise_dim, bias=False) if augment_dim else None
        if self.augment is not None:
            nn.init.xavier_uniform_(self.augment.weight)

    def augmented(self, features: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Features of the noise level, (n, noise_dim), with what is said of an augmented image added to them."""
        if self.augment is None or "augment" not in cond:
            return features
        return features + self.augment(cond["augment"].to(features.dtype))

    def with_noise(self, noise: nn.Sequential, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """e (n, emb_dim) of noise level and conditions; the first layer of ``noise`` makes the level's features."""
        features = self.augmented(noise[0](noise_cond), cond)
        return self.embed(noise[1:](features), cond)

    def embed(self, emb: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The embedding (n, emb_dim) of the noise level, with label and embedding added to it."""
        if self.label is not None:
            no_label = self.label.no_label
            label = _given(cond, "label", f"{no_label} classes", f", where {no_label} means no label")
            emb = emb + self.label(label)
        if self.embedding is not None:
            given = _given(cond, "embedding", "precomputed embeddings")
            if given.shape[-1] != self.embedding_dim:
                raise UserError(
                    f"cond['embedding'] has {given.shape[-1]} features, and the network was made for"
                    f" {self.embedding_dim}: use model.network.embedding_dim={given.shape[-1]}."
                )
            emb = emb + self.embedding(given.to(emb.dtype))
        return emb

    def beside(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(n, C + low_res, H, W): the noisy image, and the low-resolution one where there is one."""
        if not self.low_res:
            return x
        image = _given(cond, "low_res", "a low-resolution image")
        if image.shape[1] != self.low_res:
            raise UserError(
                f"cond['low_res'] has {image.shape[1]} channels, and the network was made for {self.low_res}: use"
                f" model.network.low_res={image.shape[1]}."
            )
        resized = F.interpolate(image.to(x.dtype), size=x.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([x, resized], dim=1)


def _given(cond: Mapping[str, Tensor], name: str, what: str, hint: str = "") -> Tensor:
    if name not in cond:
        raise UserError(f"This network was made for {what}: give cond['{name}']{hint}.")
    return cond[name]
