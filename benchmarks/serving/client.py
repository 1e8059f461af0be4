"""vLLM's own client, `vllm bench serve`, whose first request leaves at a given time: `client.py SECONDS ARGUMENTS..`.

Loading the client takes many seconds of a processor, which would disturb what it is to measure. SECONDS are those of the
monotonic clock, which all processes share.
"""

import asyncio
import sys
import time
from typing import Any

from vllm.benchmarks import serve  # pyright: ignore[reportMissingImports] -- in an environment of its own
from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Load everything, wait, and run."""
    at, original = float(sys.argv[1]), serve.benchmark

    async def later(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        return await original(*args, **kwargs)

    serve.benchmark = later
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    serve.main(parser.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    main()
