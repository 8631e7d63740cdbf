"""The chunk step for training: all chunks of a batch of clips at once, with the parameters of `model/wan/transformer.py`.

    stream 0: clean chunks at the context timestep; a session's slots would hold their keys and values
    stream 1: the same chunks with noise, each at the timestep of one denoising step

A chunk of either stream attends to itself and to the clean chunks of its window: the sink and the two before it. The result
equals that of `model/wan/step.py`, as a test checks.

Shapes: A streams, B clips, K chunks, N tokens of a chunk, C channels, H heads, D channels of a head, W chunks of a window.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from causalrt.config import Config
from causalrt.model.wan.rope import angles, axis_pairs
from causalrt.model.wan.transformer import Block, Wan, sinusoid


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The inputs of one forward pass.

    Attributes:
        tokens: tokens of all streams, `[A, B, K, N, 64]`.
        times: index into the timesteps of `TrainingForward`, `[A, B, K]`.
        text: prompts padded with zeros, `[X, text_len, text_dim]`.
        prompts: index into `text`, `[B, K]`.
        starts: time index of each chunk's first frame, `[B, K]`.
    """

    tokens: torch.Tensor
    times: torch.Tensor
    text: torch.Tensor
    prompts: torch.Tensor
    starts: torch.Tensor


def window_chunks(config: Config, chunk: int) -> list[int]:
    """Return the clean chunks that a chunk of a clip attends to: those of the sink, and as many as the ring holds."""
    video = config.video
    sinks = video.sink_frames // video.chunk_frames
    ring = (video.capacity_frames - video.sink_frames - video.chunk_frames) // video.chunk_frames
    return [earlier for earlier in range(chunk) if earlier < sinks or earlier >= chunk - ring]


class TrainingForward:
    """Forward passes of a model; constant tables are computed once."""

    def __init__(
        self, wan: Wan, config: Config, *, timesteps: tuple[float, ...], num_chunks: int, device: torch.device
    ) -> None:
        self.wan, self.config = wan, config
        self.sinusoids = torch.stack([sinusoid(t, config.model.freq_dim) for t in timesteps]).float().to(device)
        windows = [window_chunks(config, chunk) for chunk in range(num_chunks)]
        width = max(map(len, windows))
        padded = [window + [0] * (width - len(window)) for window in windows]
        self.windows = torch.tensor(padded, dtype=torch.int64, device=device)  # [K, W]
        there = torch.tensor(
            [[True] * len(w) + [False] * (width - len(w)) for w in windows], dtype=torch.bool, device=device
        )
        own = torch.ones(num_chunks, 1, dtype=torch.bool, device=device)
        keys = torch.cat([own, there], dim=1).repeat_interleave(config.tokens_per_chunk, dim=1)
        self.mask = keys[:, None, None]  # [K, 1, 1, (1 + W) * N]
        token = torch.arange(config.tokens_per_chunk)
        frame, place = token // config.tokens_per_frame, token % config.tokens_per_frame
        pt, py, px = axis_pairs(config.model.head_dim)
        spatial = [angles(place // config.grid_width, py), angles(place % config.grid_width, px)]
        self.spatial = torch.cat([torch.from_numpy(part) for part in spatial], dim=1).float().to(device)
        self.temporal = torch.from_numpy(angles(range(config.video.horizon_frames), pt)).float().to(device)
        self.frame = frame.to(device)

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Return the flow `[A, B, K, N, 64]`."""
        wan, (_, clips, chunks) = self.wan, inputs.times.shape
        e_TC = wan.time_embedding(self.sinusoids)
        e0_T6C = wan.time_projection(e_TC).unflatten(-1, (6, -1))
        e0 = e0_T6C[inputs.times]  # [A, B, K, 6, C]
        text = wan.text_embedding(inputs.text)
        frames = inputs.starts[..., None] + self.frame
        turned = torch.cat([self.temporal[frames], self.spatial.expand(clips, chunks, -1, -1)], dim=-1)
        rotation = turned.cos()[:, :, :, None], turned.sin()[:, :, :, None]  # [B, K, N, 1, D / 2]
        x = wan.patch_embedding(inputs.tokens)
        for block in wan.layers():
            x = self._block(block, x, e0, text, inputs.prompts, rotation)
        shift, scale = (wan.head.modulation[0] + e_TC[inputs.times][..., None, :]).unbind(-2)
        x = F.layer_norm(x, x.shape[-1:], eps=self.config.model.eps) * (1 + scale[..., None, :]) + shift[..., None, :]
        flow: torch.Tensor = wan.head.head(x)
        return flow

    def _block(
        self,
        block: Block,
        x: torch.Tensor,
        e0: torch.Tensor,
        text: torch.Tensor,
        prompts: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation[0] + e0)[..., None, :].unbind(-3)
        x = x + gate1 * self._self_attention(block, block.modulate(x, shift1, scale1), rotation)
        x = x + self._cross_attention(block, block.norm3(x), text, prompts)
        out: torch.Tensor = x + gate2 * block.ffn(block.modulate(x, shift2, scale2))
        return out

    def _self_attention(
        self, block: Block, y: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        weights, heads = block.self_attn, (self.config.model.num_heads, -1)
        q = rotate(weights.norm_q(weights.q(y).float()).unflatten(-1, heads), *rotation)
        k = rotate(weights.norm_k(weights.k(y).float()).unflatten(-1, heads), *rotation)
        v = weights.v(y).unflatten(-1, heads)
        keys, values = (torch.cat([each.unsqueeze(3), self._of_window(each)], dim=3).flatten(3, 4) for each in (k, v))
        q, keys, values = (each.flatten(0, 2).transpose(1, 2) for each in (q, keys, values))  # [A * B * K, H, N, D]
        mask = self.mask.repeat(y.shape[0] * y.shape[1], 1, 1, 1)
        out = _attend(q, keys, values, mask)
        projected: torch.Tensor = weights.o(out.transpose(1, 2).reshape(y.shape))
        return projected

    def _of_window(self, each: torch.Tensor) -> torch.Tensor:
        """Gather the clean stream's rows of each window: `[A, B, K, N, H, D]` -> `[A, B, K, W, N, H, D]`."""
        clean = each[0][:, self.windows]
        return clean.expand(len(each), *clean.shape)

    def _cross_attention(
        self, block: Block, y: torch.Tensor, text: torch.Tensor, prompts: torch.Tensor
    ) -> torch.Tensor:
        weights, heads = block.cross_attn, (self.config.model.num_heads, -1)
        k, v = (
            each.unflatten(-1, heads)[prompts] for each in (weights.norm_k(weights.k(text).float()), weights.v(text))
        )
        q = weights.norm_q(weights.q(y).float()).unflatten(-1, heads)
        # Tokens of all streams are concatenated: one attention for each clip and chunk.
        queries = q.movedim(0, 2).flatten(2, 3).flatten(0, 1).transpose(1, 2)
        keys, values = (each.flatten(0, 1).transpose(1, 2) for each in (k, v))
        out = _attend(queries, keys, values).transpose(1, 2)
        streams, clips, chunks, rows, width = y.shape
        projected: torch.Tensor = weights.o(out.reshape(clips, chunks, streams, rows, width).movedim(2, 0))
        return projected


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compute attention in float32 even under autocast: in bfloat16, the gradient takes ten times as long on a CPU."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[..., N, H, D]`, with neighbouring channels as pairs, by `[..., N, 1, D / 2]`."""
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def initialise(wan: Wan, *, seed: int) -> None:
    """Set the reference's initial values: Xavier for matrices, small text and time embeddings, and zeros for the head."""
    torch.manual_seed(seed)
    for name, parameter in wan.named_parameters():
        with torch.no_grad():
            if name.endswith("modulation"):
                parameter.normal_().div_(parameter.shape[-1] ** 0.5)
            elif name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
                parameter.fill_(1)
            elif name.endswith("bias") or name.startswith("head.head"):
                parameter.zero_()
            elif name.startswith(("text_embedding", "time_embedding")):
                parameter.normal_(std=0.02)
            else:
                torch.nn.init.xavier_uniform_(parameter)
