"""`causalrt bench`: measure executors and numbers of ranks side by side."""

from dataclasses import replace

from causalrt.commands.output import say
from causalrt.config import Config
from causalrt.errors import ConfigError
from causalrt.measure.bench.arguments import BenchRequest
from causalrt.options import configured, default_dtype
from causalrt.tools.progress_bars import shown_progress

DEFAULT_RECIPE = "bench_cpu"
EXAMPLES = """
causalrt bench
causalrt bench one-rank two-ranks --executors eager,onnxruntime --out measured
causalrt bench --recipe small --world-sizes 1,2 --repeats 9
causalrt bench --recipe wan_1_3b_480p --dtype bf16 --device cuda \\
    --executors eager,inductor
"""


def bench(request: BenchRequest = BenchRequest()) -> int:
    """Measure executors and numbers of ranks side by side: one JSON file, one picture, one table."""
    from causalrt.measure.bench.command import run

    recipe = None if request.bundles else request.recipe or DEFAULT_RECIPE

    def read_config() -> Config | None:
        if recipe is not None:
            dtype = request.dtype or default_dtype(request.overrides, request.executors or ())
            return configured(recipe, request.overrides, precision=dtype)
        if request.recipe or request.overrides or request.dtype:
            raise ConfigError(
                "the bundles fix the recipe, its fields and the dtype; leave --recipe, --set and --dtype out, or the bundles"
            )
        return None

    with shown_progress() as progress:
        run(replace(request, recipe=recipe), read_config, write=say, on_progress=progress)
    return 0
