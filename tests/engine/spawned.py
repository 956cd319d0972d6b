"""The training tool with two processes on the CPU, started as --num-gpus 2 starts them on GPUs; see test_group_signal.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import train_net

if __name__ == "__main__":
    args = train_net.parse(sys.argv[1:])
    cfg = train_net.setup(args)
    args.num_gpus, args.dist_url = 2, "auto"
    sys.exit(train_net.spawn_and_work(args, cfg))
