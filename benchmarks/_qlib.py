"""qlib's daily backtest of the same scores over the same bars; run by the Python that FIREFLYER_QLIB_PYTHON names.

`python benchmarks/_qlib.py STORE SCORES.npz`: prints one JSON object. Its top-k/drop-n at the close, with its own
limits and costs; the exchange has read its bars before the clock starts.
"""

import json
import sys
import time


def main() -> None:
    """The better of two runs, the second with its caches full."""
    import numpy as np
    import pandas as pd
    import qlib  # pyright: ignore[reportMissingImports]
    from qlib.backtest import get_exchange  # pyright: ignore[reportMissingImports]
    from qlib.contrib.evaluate import backtest_daily  # pyright: ignore[reportMissingImports]
    from qlib.contrib.strategy import TopkDropoutStrategy  # pyright: ignore[reportMissingImports]

    qlib.init(provider_uri=sys.argv[1], region="cn", kernels=1)
    with np.load(sys.argv[2]) as given:
        dates, names, scores = pd.DatetimeIndex(given["dates"].tolist()), given["names"].tolist(), given["scores"]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    signal = pd.Series(scores.ravel(), index).dropna()
    start, end = str(dates[0])[:10], str(dates[-2])[:10]  # on the last session of its calendar it raises
    costs = {
        "deal_price": "close",
        "limit_threshold": 0.095,
        "open_cost": 0.00025,
        "close_cost": 0.00075,
        "min_cost": 5,
    }
    exchange = get_exchange(start_time=start, end_time=end, codes=names, **costs)
    seconds, sessions = [], 0
    for _ in range(2):
        began = time.perf_counter()
        report, _ = backtest_daily(
            start,
            end,
            TopkDropoutStrategy(signal=signal, topk=50, n_drop=5),
            account=10_000_000,
            benchmark=str(names[0]),
            exchange_kwargs={"exchange": exchange},
        )
        seconds.append(time.perf_counter() - began)
        sessions = len(report)
    print(json.dumps({"seconds": min(seconds), "sessions": sessions, "version": qlib.__version__}))


if __name__ == "__main__":
    main()
