"""The streaming decoder of a bundle for each executor."""

import torch

from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import VAE_WEIGHTS, Bundle
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.engines.vae import check_has_vae
from causalrt.model.codecs.protocol import Decoder
from causalrt.model.codecs.registry import eager_decoder, load_vae


def make_vae(bundle: Bundle, executor: str, *, device: torch.device, num_threads: int) -> Decoder:
    """Load the decoder of a bundle for an executor; eager and inductor decode in eager PyTorch.

    Raises:
        BundleError: the bundle was built without a VAE, or its files cannot be read.
        ExecutorError: what the executor needs is missing here or in the bundle.
    """
    check_has_vae(bundle)
    if executor == "onnxruntime":
        from causalrt.engines.vae_onnx import OnnxVae

        return OnnxVae(bundle.path, device=device, num_threads=num_threads)
    if executor in FLAVOURS:
        from causalrt.engines.vae_tensorrt import TensorRTVae

        return TensorRTVae(FLAVOURS[executor], bundle, device=device)
    vae = load_vae(bundle.path / VAE_WEIGHTS, dtype=TORCH_DTYPES[bundle.config.build.precision], device=device)
    return eager_decoder(vae)
