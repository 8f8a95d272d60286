"""SGLang's server with lmc: python examples/launch_sglang.py --model-path MODEL [SGLang's flags]"""

import lmc_sglang  # noqa: F401, I001  (first: it switches lmc on)
import os
import sys

from sglang.launch_server import run_server
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils import kill_process_tree

if __name__ == "__main__":
    load_plugins()
    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
