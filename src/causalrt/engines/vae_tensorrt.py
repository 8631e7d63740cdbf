"""The streaming decoder's two graphs as TensorRT engines, of either flavour."""

from collections.abc import Callable, Mapping

import torch

from causalrt.engines.bundle import Bundle
from causalrt.engines.tensorrt import engine_files
from causalrt.engines.tensorrt_engine import EngineLoader
from causalrt.engines.tensorrt_flavour import Flavour, device_target
from causalrt.engines.vae import GraphTensor, GraphVae


class TensorRTVae(GraphVae):
    """The decoder of a bundle on one GPU, for any number of sessions."""

    def __init__(self, flavour: Flavour, bundle: Bundle, *, device: torch.device) -> None:
        """Load the engines.

        Raises:
            ExecutorError: the bundle has none for this GPU, or TensorRT cannot open them here.
        """
        files = engine_files(flavour, bundle.engines[flavour.name].targets, device_target(device))
        self._loader = loader = EngineLoader(flavour, device, kernels_of="vae")
        self._engines = [loader.load(bundle.path / file) for file in files.vae]
        loader.share_scratch()
        tensors = [
            {name: GraphTensor(shape=shape, dtype=dtype) for name, shape, dtype in e.tensors()} for e in self._engines
        ]
        super().__init__(
            device,
            inputs={name: tensor for name, tensor in tensors[1].items() if name in self._engines[1].inputs},
            outputs=[
                {name: tensor for name, tensor in found.items() if name not in engine.inputs}
                for found, engine in zip(tensors, self._engines, strict=True)
            ],
        )

    def warmed_up(self) -> None:
        """See `Decoder.warmed_up`: kernels that were compiled are kept for the next start."""
        self._loader.keep_kernels()

    def bind(self, graph: int, memory: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """See `GraphVae.bind`. An engine has one set of addresses: they are given before each run."""
        engine = self._engines[graph]

        def run() -> None:
            engine.bind(memory)
            engine.enqueue()

        return run
