"""The interpreter and the compiler cannot share a process: `test_interpreted` starts another."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
