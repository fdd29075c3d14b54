"""Updates of an imitator on 1 and on 2 devices; prints what they log, as JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from test_scripts_imitation import CLONE, GAIL, LSIQ

from scripts import clone, gail, lsiq
from spg.training import devices, loop, records
from spg.training.metrics import read_metrics

SCRIPTS = {"gail": (gail, GAIL), "lsiq": (lsiq, LSIQ), "clone": (clone, CLONE)}


def main(name: str, expert: str, out: Path) -> None:
    script, config = SCRIPTS[name]
    available, logged = jax.devices(), {}
    for count in (1, 2):
        devices.jax.devices = lambda count=count: available[:count]
        config = replace(config, demonstrations=expert, out=str(out / str(count)))
        algorithm = script.make(config)
        run = records.open_run(config, algorithm.name)
        told = loop.run(config, algorithm, run)
        assert len(told["devices"]) == count, told
        logged[count] = {k: np.asarray(v).tolist() for k, v in read_metrics(run).items()}
    print(json.dumps(logged))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
