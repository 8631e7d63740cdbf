"""The decoder's process: it holds the VAE of a bundle, and the decoder state of each session.

Decoding has its own process so that frames are decoded on any free device while the ranks run the context pass or serve another
session, and so that its failures are reported and handled like those of a rank.
"""

import logging
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import VAE_WEIGHTS, Bundle, reopen_bundle
from causalrt.engines.streams import own_stream
from causalrt.engines.vae_make import make_vae
from causalrt.errors import CausalRTError, RequestError
from causalrt.model.codecs.decode_state import DecodeState
from causalrt.model.codecs.protocol import Decoder
from causalrt.model.codecs.registry import encode, vae_from_tensors
from causalrt.model.stored_tensors import map_tensors
from causalrt.runtime.memory import device_free_bytes, is_out_of_memory
from causalrt.runtime.messages import (
    CloseCommand,
    DecodeCommand,
    Done,
    EncodeCommand,
    Encoded,
    Frames,
    LoadVaeCommand,
    Refused,
    Reply,
    ResumeCommand,
    SaveCommand,
    VaeCommand,
    out_of_memory,
    send,
)
from causalrt.runtime.snapshot import DECODER_FILE, load_tensors, save_tensors

logger = logging.getLogger("causalrt.vae")


class VaeServer:
    """Executes the commands sent to the decoder."""

    def __init__(self, channel: "Connection[Any, Any]") -> None:
        self._channel = channel
        self._states: dict[int, DecodeState] = {}
        self._device = torch.device("cpu")
        self._bundle: Bundle
        self._vae: Decoder
        self._weights: dict[str, torch.Tensor] = {}
        self._whole_vae: Any = None

    def run(self, command: VaeCommand) -> Done:
        """Execute a command, and return its last reply."""
        match command:
            case LoadVaeCommand():
                return self._load(command)
            case DecodeCommand() | EncodeCommand() | SaveCommand() | ResumeCommand():
                answer = self._answer(command)
                if answer is not None:
                    send(self._channel, answer)
            case CloseCommand():
                self._states.pop(command.session, None)
        return Done()

    def _warm_up(self) -> None:
        """Run both graphs once, since some kernels are compiled, or chosen by trial, on the first run."""
        config = self._bundle.config
        size = config.video.latent_height, config.video.latent_width
        self._vae.open().decode(torch.zeros(2, config.model.latent_channels, *size))
        self._vae.warmed_up()

    def _answer(self, command: DecodeCommand | EncodeCommand | SaveCommand | ResumeCommand) -> Reply | None:
        try:
            match command:
                case DecodeCommand():
                    return self._decode(command)
                case EncodeCommand():
                    return self._encode(command)
                case SaveCommand():
                    save_tensors(self._state(command.session).snapshot(), command.folder / DECODER_FILE, {})
                case ResumeCommand():
                    state, path = self._vae.open(), command.folder / DECODER_FILE
                    snapshot = load_tensors(path, command.files[DECODER_FILE])
                    try:
                        state.restore(snapshot)
                    except RequestError as error:
                        raise RequestError(f"{path} is damaged: {error}; take another snapshot") from error
                    if state.latent_frames != command.frame:
                        raise RequestError(
                            f"{path} is damaged, or of another snapshot: it is after "
                            f"{state.latent_frames} latents, the session after {command.frame}; take another snapshot"
                        )
                    self._states[command.session] = state
            return None
        except CausalRTError as error:
            return Refused(kind=type(error).__name__, message=str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("out of memory: %s", error)
            if isinstance(command, DecodeCommand):
                self._states.pop(command.session, None)
            return out_of_memory("the decoder", error)

    def _load(self, command: LoadVaeCommand) -> Done:
        torch.set_num_threads(command.num_threads)
        self._device = torch.device(command.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        own_stream(self._device).__enter__()  # until the process ends
        self._bundle = reopen_bundle(command.bundle, command.digest)
        self._weights = map_tensors(self._bundle.path / VAE_WEIGHTS)
        self._vae = make_vae(self._bundle, command.executor, device=self._device, num_threads=command.num_threads)
        if self._device.type == "cuda":
            self._warm_up()
        logger.info("decoder ready: as %s does, on %s", command.executor, self._device)
        return Done(free_bytes=device_free_bytes(self._device))

    def _state(self, session: int) -> DecodeState:
        """Return the decoder state of a session, which is created on first use."""
        if session not in self._states:
            self._states[session] = self._vae.open()
        return self._states[session]

    def _decode(self, command: DecodeCommand) -> Frames:
        start = time.perf_counter()
        frames = self._state(command.session).decode(command.latents).cpu()
        return Frames(frames=frames, decode_ms=1e3 * (time.perf_counter() - start))

    def _encode(self, command: EncodeCommand) -> Encoded:
        if self._whole_vae is None:
            dtype = TORCH_DTYPES[self._bundle.config.build.precision]
            path, config = self._bundle.path / VAE_WEIGHTS, self._bundle.vae
            assert config is not None
            # Use the tensors that were mapped when the bundle was loaded: by now the file may be gone, or belong to another
            # bundle.
            self._whole_vae = vae_from_tensors(path, self._weights, config, dtype=dtype, device=self._device)
            self._weights = {}
        return Encoded(latents=encode(self._whole_vae, command.frames).cpu())
