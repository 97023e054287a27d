"""Writes golden/vit: small vision encoders in the files people have, and what they compute.

A maintainer's command, not a test: `pip install torch torchvision timm transformers monai`, then
`python tests/golden/make_vit.py`.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import timm
import torch
from monai.networks.nets.resnet import ResNet as MonaiResNet
from safetensors.torch import save_file
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

HERE = Path(__file__).parent / "vit"


def trained(model: torch.nn.Module, seed: int) -> None:
    """Gives every parameter and statistic a size it could have after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if not p.is_floating_point():
            continue
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif p.ndim == 1 and name.endswith("weight"):
            noise = 1.0 + 0.3 * noise
        elif p.ndim == 1:
            noise = 0.15 * noise
        elif any(part in name for part in ("cls_token", "pos", "patch_embed")):
            # Small, so that the epsilons of the norms count.
            noise = 0.02 * noise
        else:
            noise = noise * p[0].numel() ** -0.5
        p.data.copy_(noise)


def record(name: str, image: torch.Tensor, run) -> None:
    """Stores images and the pooled vector and tokens that a model gives in float64."""
    with torch.no_grad():
        pooled, tokens = run(image.double())
    np.savez_compressed(HERE / f"{name}.npz", image=image.numpy(), pooled=pooled.numpy(),
                        tokens=tokens.numpy())


def images(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(7)).half()


def timm_vit() -> None:
    """timm, with patches that are no squares."""
    model = timm.models.VisionTransformer(
        img_size=(24, 12), patch_size=(8, 4), in_chans=3, num_classes=4, embed_dim=18, depth=3,
        num_heads=3, mlp_ratio=2).eval()
    trained(model, 0)
    save_file(model.state_dict(), HERE / "timm.safetensors")

    def run(image):
        x = model.double().forward_features(image)
        return x[:, 0], x[:, 1:]

    record("timm", images(3, 24, 12), run)


def mae() -> None:
    """MAE's file: the encoder has timm's names, its decoder lies beside it; fixed positions."""
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, num_classes=0, embed_dim=16, depth=2, num_heads=4,
        mlp_ratio=3).eval()
    trained(model, 1)
    torch.manual_seed(1)
    extra = {name: torch.randn(*shape) for name, shape in (
        ("mask_token", (1, 1, 8)), ("decoder_pos_embed", (1, 5, 8)),
        ("decoder_embed.weight", (8, 16)), ("decoder_embed.bias", (8,)),
        ("decoder_blocks.0.norm1.weight", (8,)), ("decoder_norm.bias", (8,)),
        ("decoder_pred.weight", (64, 8)))}
    torch.save({"model": {**model.state_dict(), **extra}, "epoch": 799,
                "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
                "args": argparse.Namespace(model="mae_vit", lr=1e-3)}, HERE / "mae.pth")

    def run(image):
        x = model.double().forward_features(image)
        return x[:, 0], x[:, 1:]

    record("mae", images(1, 16, 16), run)


def hugging_face() -> None:
    """A ViT with a classifier, an epsilon of its own, and images that are no squares."""
    shutil.rmtree(HERE / "hf_vit", ignore_errors=True)
    model = ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=(24, 16), patch_size=8, num_channels=2, layer_norm_eps=1e-4)).eval()
    trained(model, 2)
    model.save_pretrained(HERE / "hf_vit")

    def run(image):
        x = model.double().vit(image).last_hidden_state
        return x[:, 0], x[:, 1:]

    record("hf_vit", images(2, 24, 16), run)


def hugging_face_mae() -> None:
    """ViTMAE with its decoder."""
    shutil.rmtree(HERE / "hf_mae", ignore_errors=True)
    model = ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        image_size=24, patch_size=8, num_channels=1, mask_ratio=0.0, decoder_hidden_size=8,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=8)).eval()
    trained(model, 3)
    model.save_pretrained(HERE / "hf_mae")

    def run(image):
        # Nothing is masked, and patches are not shuffled.
        x = model.double().vit(image, noise=torch.arange(9.0).expand(2, 9)).last_hidden_state
        return x[:, 0], x[:, 1:]

    record("hf_mae", images(1, 24, 24), run)


class Narrow(ResNet):
    """torchvision's ResNet, with a thirty-second of its channels."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.conv1 = torch.nn.Conv2d(3, 2, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(2)

    def _make_layer(self, block, planes, *args, **options):
        if planes == 64:
            self.inplanes = 2
        return super()._make_layer(block, planes // 32, *args, **options)


def features(model: torch.nn.Module):
    """Runs a ResNet up to its pooled vector, and the places of the stage before the last."""
    def run(image):
        model.double()
        seen = {}
        handles = [getattr(model, name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out})) for name in
            ("layer3", "layer4")]
        model.fc = torch.nn.Identity()
        model(image)
        for handle in handles:
            handle.remove()
        return (seen["layer4"].flatten(2).mean(2), seen["layer3"].flatten(2).transpose(1, 2))
    return run


def resnets() -> None:
    """torchvision's two kinds of blocks, and MONAI's with volumes, weights in 16 bits."""
    # MONAI calls a basic block of volumes "basic" and gives shortcuts a bias unless told.
    cases = {
        "resnet_basic": (Narrow(BasicBlock, [2, 1, 1, 1]), images(3, 36, 28), ""),
        "resnet_bottleneck": (Narrow(Bottleneck, [1, 2, 1, 1]), images(3, 24, 36), "module."),
        "monai_basic": (MonaiResNet(
            "basic", [1, 1, 2, 1], [2, 4, 8, 16], n_input_channels=1, conv1_t_stride=2),
            images(1, 28, 20, 16), ""),
        "monai_bottleneck": (MonaiResNet(
            "bottleneck", [1, 1, 1, 1], [2, 4, 8, 16], n_input_channels=1, conv1_t_stride=2,
            bias_downsample=False), images(1, 16, 28, 20), "module."),
    }
    for seed, (name, (model, image, prefix)) in enumerate(cases.items(), 4):
        trained(model.eval(), seed)
        model.half()
        state = {prefix + key: value for key, value in model.state_dict().items()
                 if not key.startswith("fc.")}
        state |= {f"{prefix}fc.{end}": torch.zeros(2) for end in ("weight", "bias")}
        if prefix:
            torch.save({"state_dict": state}, HERE / f"{name}.pth")
        else:
            save_file(state, HERE / f"{name}.safetensors")
        record(name, image, features(model))


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for write in (timm_vit, mae, hugging_face, hugging_face_mae, resnets):
        write()
