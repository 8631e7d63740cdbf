"""What a request may ask of the loaded bundle: picture size, frame rate, lengths, and prompts."""

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
    """Sizes of the videos that the bundle makes, and the limits of a request.

    Attributes:
        model_name: name of the model in jobs.
        height: height of a frame in pixels.
        width: width of a frame in pixels.
        codec: scales and frame rate of the codec.
        chunk_frames: latent frames per chunk.
        first_frames: latent frames of the first chunk of a video.
        mime: MIME type of the fragments, for a browser.
        max_chunks: most chunks of a generation; None sets no limit.
        max_seconds: greatest length of a job's video.
        max_prompt_chars: most characters of a prompt.
        about: description of the model.
        examples: example prompts.
        tokenize: returns the tokens that the text encoder reads of a prompt; raises PromptError for a text that it refuses.
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
        """Derive the limits from `config` and `settings`.

        Raises:
            RequestError: no video file can have this picture size or frame rate.
            ExecutorError: PyAV is not installed.
        """
        video = config.video
        max_chunks = settings.max_chunks if video.time_index == "relative" else video.horizon_chunks
        if max_chunks is not None and settings.max_chunks is not None:
            max_chunks = min(max_chunks, settings.max_chunks)
        height, width, fps = video.pixel_height, video.pixel_width, video.fps
        limits = cls(
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
            return limits
        whole = math.floor(1000 * limits.num_frames(max_chunks) / fps) / 1000
        return replace(limits, max_seconds=min(whole, limits.max_seconds))

    @property
    def fps(self) -> int:
        """Frames a second."""
        return self.codec.fps

    @property
    def size(self) -> str:
        """Picture size in OpenAI's notation, WIDTHxHEIGHT."""
        return f"{self.width}x{self.height}"

    @property
    def default_seconds(self) -> str:
        """Length of the video of a job that names none, as text."""
        return f"{min(DEFAULT_SECONDS, self.max_seconds):g}"

    def num_frames(self, chunks: int) -> int:
        """Return the frames of the first `chunks` chunks of a video."""
        return self.codec.frames_of(self.first_frames + (chunks - 1) * self.chunk_frames)

    def frames_and_chunks(self, seconds: float) -> tuple[int, int]:
        """Return the frames of a video of this length, at least one, and the chunks that it takes to make them."""
        frames = max(1, round(seconds * self.fps))
        latents = self.codec.latents_of(frames)
        return frames, 1 + max(0, math.ceil((latents - self.first_frames) / self.chunk_frames))

    def check_prompt(self, prompt: str) -> int | None:
        """Check a prompt; return the number of tokens to which the text encoder cuts it, or None if it reads the whole prompt.

        Raises:
            ApiError: 400, the prompt is empty or too long, or has control characters or words that the text encoder lacks.
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
        """Return the number of chunks to generate; None asks for as many as possible.

        Raises:
            ApiError: 400, there are too many, or none.
        """
        most = ENDLESS if self.max_chunks is None else self.max_chunks
        if chunks is not None and not 1 <= chunks <= most:
            raise bad_request(f"chunks must be 1 to {most}, got {chunks}", param="chunks")
        return most if chunks is None else chunks


def prompt_warnings(cut_to: int | None) -> list[dict[str, str]]:
    """Return the warnings for a prompt that was cut to `cut_to` tokens; none if it was not cut."""
    if cut_to is None:
        return []
    message = f"the prompt was cut: the model reads its first {cut_to} tokens, and what comes after them has no effect"
    return [{"code": "prompt_cut", "message": message, "param": "prompt"}]
