"""Write a random checkpoint laid out as the released Self-Forcing file: {"generator_ema": {"model.<name>": float32}}.

    python benchmarks/make_checkpoint.py --recipe wan_1_3b_480p --seed 0 --out /tmp/random.pt
    python benchmarks/make_checkpoint.py --recipe tiny --out trial/tiny.pt --vae trial --text-encoder trial

For a trial, `--vae` and `--text-encoder` write small random ones beside it, in the layout of a diffusers folder.

torch.save wants every tensor at once, 5.7 GB for the 1.3B model. So the file is first laid out without data, then
mapped and filled tensor by tensor. It has no checksums, since torch would compute them before there is any data.
"""

import argparse
import mmap
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.serialization import config as serialization_config

from causalrt.config import ModelConfig, override
from causalrt.export.checkpoint import model_shapes
from causalrt.export.random_encoders import SMALL_VAE, random_vae, write_text_encoder
from causalrt.export.random_weights import random_weights
from causalrt.recipes import RECIPES, recipe


def make_checkpoint(model: ModelConfig, *, seed: int, out: Path) -> None:
    """Write the file; after a failure there is no file at `out`."""
    shapes = model_shapes(model)
    partial = out.with_name(f".{out.name}.partial")
    try:
        with FakeTensorMode():
            empty = {f"model.{name}": torch.empty(shape) for name, shape in shapes.items()}
        without_checksums = serialization_config.patch({"save.compute_crc32": False})  # type: ignore[attr-defined]
        with torch.serialization.skip_data(materialize_fake_tensors=True), without_checksums:
            torch.save({"generator_ema": empty}, partial)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(partial, weights_only=True, mmap=True)["generator_ema"]
        for done, (name, tensor) in enumerate(random_weights(model, seed=seed), start=1):
            mapped[f"model.{name}"].copy_(tensor)
            print(f"\r{done}/{len(shapes)} tensors", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="wan_1_3b_480p", choices=list(RECIPES))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as model.num_layers=2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="folder for a small VAE")
    parser.add_argument("--text-encoder", type=Path, help="folder for a small text encoder")
    args = parser.parse_args()
    model = override(recipe(args.recipe), dict(change.split("=", 1) for change in args.set)).model
    args.out.parent.mkdir(parents=True, exist_ok=True)
    make_checkpoint(model, seed=args.seed, out=args.out)
    if args.vae is not None:
        random_vae(SMALL_VAE, seed=args.seed).save_pretrained(args.vae / "vae")
    if args.text_encoder is not None:
        write_text_encoder(args.text_encoder, text_dim=model.text_dim, seed=args.seed)


if __name__ == "__main__":
    main()
