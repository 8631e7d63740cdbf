import json
import os
import subprocess
import sys

import pytest
from support import SUPPORT


@pytest.mark.slow
@pytest.mark.parametrize(("target", "world_size"), [(90, 8), (80, 8), (90, 1)])
def test_what_torch_launches_is_what_an_engine_embeds(target, world_size, tmp_path):
    script = SUPPORT / "jitted_launches.py"
    done = subprocess.run(
        [sys.executable, script, str(target), str(world_size), tmp_path],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "triton")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4
    for launch in found:
        assert launch["same"], f"{launch['name']}: torch and an engine would run different instructions"
        assert launch["instructions"] > 100
        assert {key: launch[key] for key in launch["planned"]} == launch["planned"]
