"""Which number of ranks is worth it, in words."""

from collections.abc import Sequence

from causalrt.tools.plan.predict import Forecast

REAL_TIME = 16.0
"""Frames a second at which the model's videos play."""
WORTH = 0.5
"""Of the GPUs that are added, the share that must come back as speed."""


def best_layouts(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """For each number of ranks, the layout that can be built with most frames a second; numbers rising."""
    best: dict[int, Forecast] = {}
    for each in forecasts:
        known = best.get(each.world_size)
        if each.layout != "gathered" and (known is None or _speed(each) > _speed(known)):
            best[each.world_size] = each
    return [best[ranks] for ranks in sorted(best)]


def verdict(forecasts: Sequence[Forecast]) -> list[str]:
    """Sentences about `forecasts` of one machine; nominal times throughout."""
    by_ranks = best_layouts(forecasts)
    if len(by_ranks) < 2:
        return []
    first, sentences = by_ranks[0], []
    fastest = max(by_ranks, key=_speed)
    if fastest is first:
        sentences.append(
            f"{first.world_size} rank(s) are the fastest: {_speed(first):.1f} frames/s; {by_ranks[1].world_size} make "
            f"{_speed(by_ranks[1]):.1f}. Use one GPU a session, and more GPUs for more sessions."
            if first.world_size == 1
            else f"{first.world_size} ranks are the fastest of those asked for: {_speed(first):.1f} frames/s."
        )
    else:
        worth = first
        for each in by_ranks[1:]:
            gained = _speed(each) / _speed(worth) - 1
            if gained >= WORTH * (each.gpus / worth.gpus - 1):
                worth = each
        what = "is worth it" if worth.world_size == 1 else "are worth it"
        sentences.append(
            f"{worth.world_size} rank(s) {what}: {_speed(worth):.1f} frames/s on {worth.gpus} GPU(s), "
            f"{_speed(worth) / worth.gpus:.1f} for each; beyond, less than {WORTH:.0%} of what is added comes back as speed."
        )
        sentences.append(
            f"The fastest is {fastest.world_size} ranks ({fastest.layout}): {_speed(fastest):.1f} frames/s."
        )
    real_time = [each for each in by_ranks if _speed(each) >= REAL_TIME]
    if real_time:
        least = real_time[0]
        sure = least.steady_frames_per_second.worst >= REAL_TIME
        sentences.append(
            f"{REAL_TIME:.0f} frames/s, real time, wants {least.world_size} rank(s) ({least.layout})"
            + ("." if sure else ", if the middle of the assumptions holds.")
        )
    else:
        sentences.append(f"None reaches {REAL_TIME:.0f} frames/s, real time.")
    last = fastest.chunks[-1]
    ranks_s = last.denoise_s.nominal + last.step_s.nominal
    if last.decode_s.nominal > ranks_s:
        sentences.append(
            f"The VAE is the bottleneck there: {1e3 * last.decode_s.nominal:.0f} ms a chunk; "
            f"the ranks take {1e3 * ranks_s:.0f}."
        )
    return sentences


def _speed(each: Forecast) -> float:
    return each.steady_frames_per_second.nominal
