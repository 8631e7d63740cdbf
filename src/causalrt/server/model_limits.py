"""What the loaded bundle can be asked for: picture, rate, lengths; and what a prompt has to be."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from causalrt.codec_geometry import CodecGeometry
from causalrt.config import Config
from causalrt.errors import PromptError, RequestError
from causalrt.media.video_file import FragmentWriter
from causalrt.model.text.umt5 import PromptTokens, clean_prompt
from causalrt.server.api_errors import bad_request
from causalrt.server.settings import ServerSettings

DEFAULT_SECONDS = 4  # OpenAI's
ENDLESS = 2**31 - 1
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """Sizes of the bundle's videos, and the limits of a request.

    Attributes:
        model_name: what jobs call the model.
        height: pixels.
        width: pixels.
        codec: scales and frame rate of the codec.
        chunk_frames: latent frames of a chunk.
        first_frames: latent frames of a video's first chunk.
        mime: of the fragments, for a browser.
        max_chunks: of a generation; None is without an end.
        max_seconds: of a job's video.
        max_prompt_chars: of a prompt.
        about: what is to be said of the model.
        examples: prompts for it.
        tokenize: gives the tokens that the text encoder reads of a prompt; raises PromptError for a text that it refuses.
    """

    model_name: str
    height: int
    width: int
    codec: CodecGeometry
    chunk_frames: int
    first_frames: int
    mime: str
    max_chunks: int | None
    max_seconds: float
    max_prompt_chars: int
    about: str
    examples: tuple[str, ...]
    tokenize: Callable[[str], PromptTokens]

    @classmethod
    def from_config(cls, config: Config, settings: ServerSettings, *, tokenize: Callable[[str], PromptTokens]) -> Self:
        """What `config` makes, within the limits of `settings`.

        Raises:
            RequestError: sizes that no video file can have.
            ExecutorError: PyAV is not installed.
        """
        video = config.video
        max_chunks = settings.max_chunks if video.time_index == "relative" else video.horizon_chunks
        if max_chunks is not None and settings.max_chunks is not None:
            max_chunks = min(max_chunks, settings.max_chunks)
        height, width, fps = video.pixel_height, video.pixel_width, video.fps
        offer = cls(
            model_name=settings.model_name,
            height=height,
            width=width,
            codec=video.codec,
            chunk_frames=video.chunk_frames,
            first_frames=video.frames_at(0),
            mime=FragmentWriter(height=height, width=width, fps=fps).mime,
            max_chunks=max_chunks,
            max_seconds=settings.max_seconds,
            max_prompt_chars=settings.max_prompt_chars,
            about=settings.about,
            examples=settings.examples,
            tokenize=tokenize,
        )
        if max_chunks is None:
            return offer
        whole = math.floor(1000 * offer.num_frames(max_chunks) / fps) / 1000
        return replace(offer, max_seconds=min(whole, offer.max_seconds))

    @property
    def fps(self) -> int:
        """Frames a second."""
        return self.codec.fps

    @property
    def size(self) -> str:
        """As OpenAI writes it: width x height."""
        return f"{self.width}x{self.height}"

    @property
    def default_seconds(self) -> str:
        """Of a job that names none."""
        return f"{min(DEFAULT_SECONDS, self.max_seconds):g}"

    def num_frames(self, chunks: int) -> int:
        """Frames of the first `chunks` chunks of a video."""
        return self.codec.frames_of(self.first_frames + (chunks - 1) * self.chunk_frames)

    def frames_and_chunks(self, seconds: float) -> tuple[int, int]:
        """Frames of a video of this length, at least one, and the chunks that hold them."""
        frames = max(1, round(seconds * self.fps))
        latents = self.codec.latents_of(frames)
        return frames, 1 + max(0, math.ceil((latents - self.first_frames) / self.chunk_frames))

    def check_prompt(self, prompt: str) -> int | None:
        """The number of tokens that the text encoder cuts the prompt to, because it has more; None if it is read to its end.

        Raises:
            ApiError: 400, nothing to show, too long, with characters that no text has, or words that are not known.
        """
        if len(prompt) > self.max_prompt_chars:
            raise bad_request(
                f"a prompt may have {self.max_prompt_chars} characters, got {len(prompt)}", param="prompt"
            )
        try:
            if not clean_prompt(prompt):
                raise bad_request("the prompt is empty; say what the video shows", param="prompt")
            tokens = self.tokenize(prompt)
        except (PromptError, RequestError) as error:
            raise bad_request(str(error), param="prompt") from None
        return len(tokens.ids) if tokens.truncated else None

    def checked_chunks(self, chunks: int | None) -> int:
        """Chunks to generate; None is as many as there can be.

        Raises:
            ApiError: 400, too many.
        """
        most = ENDLESS if self.max_chunks is None else self.max_chunks
        if chunks is not None and not 1 <= chunks <= most:
            raise bad_request(f"chunks must be 1 to {most}, got {chunks}", param="chunks")
        return most if chunks is None else chunks


def prompt_warnings(cut_to: int | None) -> list[dict[str, str]]:
    """What the answer to a request says of a prompt that was cut to so many tokens; nothing if it was not."""
    if cut_to is None:
        return []
    message = f"the prompt was cut: the model reads its first {cut_to} tokens, and what comes after them has no effect"
    return [{"code": "prompt_cut", "message": message, "param": "prompt"}]
