"""`brgsa summarize`: reports to lists of canonical findings."""

import argparse
import contextlib
from typing import Any

from brgsa_jax.cli.common import Add, natural, positive, terminal
from brgsa_jax.config import UserError


def add(command: Add) -> None:
    """Adds the command."""
    sub = command("summarize", summarize, "reports to lists of canonical findings")
    sub.add_argument("table", metavar="IN", help="CSV, TSV, JSONL or Parquet, a row a report")
    sub.add_argument("--text-column", required=True, action="append", metavar="C",
                     help="column of the report; may be repeated, the columns are joined")
    sub.add_argument("--id-column", metavar="I", help="column of the ids ['id', else the row]")
    sub.add_argument("--out", required=True, help="JSONL file, one object a report")
    sub.add_argument("--backend", default="lexicon", choices=("lexicon", "openai", "transformers"),
                     help="rules, a server, or a model on this machine [%(default)s]")
    sub.add_argument("--cache", help="answers kept between calls [OUT.cache; lexicon keeps none]")
    both = sub.add_argument_group("openai and transformers")
    both.add_argument("--model", help="name at the server; or a folder or hub id")
    both.add_argument("--max-tokens", type=positive, help="of one answer [512; 256]")
    server = sub.add_argument_group("openai")
    server.add_argument("--endpoint", default="http://127.0.0.1:8000/v1", help="[%(default)s]")
    server.add_argument("--send-reports-to", metavar="HOST",
                        help="the one other machine that may be sent reports")
    server.add_argument("--key-variable", metavar="NAME",
                        help="environment variable with the key [OPENAI_API_KEY]")
    server.add_argument("--concurrency", type=positive, default=8, help="[%(default)s]")
    server.add_argument("--requests-per-minute", type=float)
    server.add_argument("--timeout", type=float, default=120.0, help="seconds [%(default)s]")
    server.add_argument("--retries", type=natural, default=6, help="[%(default)s]")
    server.add_argument("--seed", type=natural, default=0, help="[%(default)s]")
    server.add_argument("--prices", type=_prices, metavar="IN,OUT",
                        help="of a million prompt and answer tokens")
    local = sub.add_argument_group("transformers")
    local.add_argument("--batch-size", type=positive, default=8, help="[%(default)s]")
    local.add_argument("--device", help="cpu, cuda, cuda:1 … [a GPU if there is one]")


def _prices(text: str) -> tuple[float, float]:
    prompt, answer = map(float, text.split(","))
    return prompt, answer


def summarize(options: argparse.Namespace) -> int:
    """Summarises a table of reports; what has no summary is listed in it with the reason."""
    from rich.progress import Progress

    from brgsa_jax.summarize.cache import Cache
    from brgsa_jax.summarize.run import summarize_table

    backend = _summary_backend(options)
    console = terminal()
    # The lexicon is faster than its cache, and an old answer would outlive a new rule.
    keep = contextlib.nullcontext() if options.backend == "lexicon" else Cache(
        options.cache or f"{options.out}.cache")
    try:
        with keep as cache, Progress(console=console, transient=True,
                                     disable=not console.is_terminal) as bar:
            task = bar.add_task("reports", total=None)
            counts = summarize_table(
                options.table, text_column=options.text_column, id_column=options.id_column,
                out=options.out, backend=backend, cache=cache,
                progress=lambda done, total: bar.update(task, completed=done, total=total))
    finally:
        # Also of a run that was stopped: what it asked for was paid.
        account = getattr(backend, "account", None)
        if account is not None:
            console.print(str(account))
    console.print(f"{counts.rows} reports: {counts.ok} with findings, {counts.normal} normal, "
                  f"{counts.failed} failed; {counts.asked} read, {counts.cached} from the cache")
    console.print(f"summaries {options.out}")
    return 1 if counts.failed == counts.rows else 0


def _summary_backend(options: argparse.Namespace) -> Any:
    """The backend that the options name.

    Raises:
        UserError: an option or a package is missing.
    """
    if options.backend == "lexicon":
        from brgsa_jax.summarize.lexicon import Lexicon

        return Lexicon()
    from brgsa_jax.summarize import llm

    if not options.model:
        raise UserError(f"--backend {options.backend} needs --model")
    limit = {} if options.max_tokens is None else {"max_tokens": options.max_tokens}
    if options.backend == "transformers":
        return llm.TransformersBackend(options.model, batch_size=options.batch_size,
                                       device=options.device, **limit)
    return llm.OpenAIBackend(
        options.model, endpoint=options.endpoint, send_reports_to=options.send_reports_to,
        key_variable=options.key_variable, concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute, timeout=options.timeout,
        retries=options.retries, seed=options.seed,
        prices=llm.Prices(*options.prices) if options.prices else None, **limit)
