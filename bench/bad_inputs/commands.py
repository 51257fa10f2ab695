"""What a command's own flags do not take."""

from collections.abc import Callable, Iterator

from bad_inputs import Case, Place

_LONG = "9" * 30
_RESULTS = "results/rtx-4050-laptop-6gb"
_WITH_RECIPE = ("train", "explain", "longest", "lengths", "phases")
_ALL = (*_WITH_RECIPE, "plan", "generate", "merge", "data", "bisect", "report", "watch", "readme")
_NUMBERS = ("0", "-1", "1.5", "x", "", "nan", _LONG, "99999999999999999999", "1" * 5000)
_SIZES = ("", "x", "-1", "nan", "0", "1.5", "5 Gb/s", _LONG, "1KB", "9" * 5000, "1e9GB", "²GB", "12GB GB")


def _fixed(*words: str) -> Callable[[Place], list[str]]:
    """`GOOD/...` is among what is good, `NEW/...` where nothing is yet."""
    return lambda place: [place.path(word) for word in words]


def _good(command: str) -> tuple[str, ...]:
    """Words with which it would do something."""
    return {
        "plan": ("--config", "GOOD/good.yaml", "--card", "12GB", "--no-cache"),
        "generate": ("--run", "GOOD/run", "--prompt", "a", "--quiet"),
        "merge": ("--run", "GOOD/run", "--to", "/nowhere/merged", "--quiet"),
        "data": ("check", "GOOD/data.jsonl"),
        "bisect": ("--good", "GOOD/good.txt", "--bad", "GOOD/bad.txt", "--config", "GOOD/good.yaml"),
        "report": (_RESULTS,),
        "watch": ("--once",),
        "readme": (),
    }.get(command, ("--config", "GOOD/good.yaml"))


def cases() -> Iterator[Case]:
    """Flags that are unknown, twice what they cannot be, out of bounds."""
    for command in _ALL:
        yield Case(command, "an unknown flag", _fixed(*_good(command), "--nonesuch"), ("--nonesuch",))
        yield Case(command, "an unknown flag with a value", _fixed(*_good(command), "--nonesuch=3"), ("--nonesuch",))
        yield Case(command, "one word too many", _fixed(*_good(command), "--", "-"))
        if command not in ("watch", "readme"):
            yield Case(command, "nothing", _fixed())
        for target in (
            () if command in ("watch", "report", "readme") else ("", "/", "/nowhere/x.json", "GOOD", "/dev/full/x")
        ):
            words = _good(command)
            yield Case(command, f"--json: {target!r}", _json(words, target), ("--json",))
    for command in _WITH_RECIPE:
        yield Case(command, "--config without a value", _fixed("--config"), ("--config",))
        yield Case(command, "a flag without its value", _fixed(*_good(command), "--lora-r"), ("--lora-r",))
        yield Case(
            command,
            "an unknown card",
            _fixed(*_good(command), "--device", "virtual", "--card", "rtx-9999"),
            ("rtx-9999",),
        )
        yield Case(
            command, "a card of no size", _fixed(*_good(command), "--device", "virtual", "--card", "GB"), ("card",)
        )
        yield Case(
            command,
            "a card of 30 digits",
            _fixed(*_good(command), "--device", "virtual", "--card", f"{_LONG}GB"),
            ("card",),
        )
        yield Case(
            command, "a card of a byte", _fixed(*_good(command), "--device", "virtual", "--card", "1B"), ("card",)
        )
        yield Case(command, "a model that is nowhere", _fixed(*_good(command), "--model", "./none"), ("base.model",))
        yield Case(command, "an unknown model", _fixed(*_good(command), "--model", "granite-9"), ("base.model",))
        yield Case(command, "an empty model", _fixed(*_good(command), "--model", ""), ("base.model",))
        yield Case(command, "a model of 5,000 letters", _fixed(*_good(command), "--model", "x" * 5000), ("base.model",))
        yield Case(command, "a model of nobody's", _fixed(*_good(command), "--model", "~nobody9/x"), ("base.model",))
        for flag, value in () if command == "train" else (("--data", "my.jsonl"), ("--eval-fraction", "0.1")):
            says = (f"data.{flag[2:].replace('-', '_')}",)
            yield Case(command, f"samples that are not run: {flag}", _fixed(*_good(command), flag, value), says)
        yield Case(command, "a hub id of five parts", _fixed(*_good(command), "--model", "a/b/c/d/e"), ("base.model",))
    yield from _of_numbers("longest", ("--limit", "--step"))
    yield from _of_numbers("lengths", ("--lengths",))
    yield from _of_numbers("plan", ("--seq", "--limit", "--step"))
    yield from _of_numbers("generate", ("--samples", "--max-new-tokens"))
    yield from _of_numbers("watch", ("--pid", "--gpu"), allowed=("0",))
    for text in ("0", "-1", "nan", "inf", "x", "", "1e-9"):
        yield Case("watch", f"--interval: {text}", _fixed(f"--interval={text}"), ("--interval",))
    for text in _SIZES:
        yield (
            Case("watch", f"--warn: {text[:40]!r}", _fixed(f"--warn={text}"), ("--warn",))
            if text not in ("0", _LONG, "1KB")
            else Case("watch", f"--warn: {text[:40]!r}", _fixed(f"--warn={text}"))
        )
        yield Case(
            "plan",
            f"--memory: {text[:40]!r}",
            _fixed("--config", "GOOD/good.yaml", "--card", "rtx-3060-12gb", "--no-cache", f"--memory={text}"),
        )
        yield Case(
            "plan",
            f"--memory alone: {text[:40]!r}",
            _fixed("--config", "GOOD/good.yaml", "--no-cache", f"--memory={text}"),
        )
        yield Case(
            "virtual-gpu",
            f"--memory: {text[:40]!r}",
            _fixed("--card", "rtx-3060-12gb", f"--memory={text}", "--", "true"),
        )
        yield Case(
            "plan",
            f"--card NAME@: {text[:40]!r}",
            _fixed("--config", "GOOD/good.yaml", "--no-cache", f"--card=rtx-3060-12gb@{text}"),
            ("card",),
        )
        if text in ("", "0", "1KB"):  # nothing said, and budgets that no test meets
            continue
        yield Case("pytest", f"--vram-budget: {text[:40]!r}", _pytest(f"--vram-budget={text}"), ("--vram-budget",))
        yield Case(
            "pytest", f"vram_tolerance: {text[:40]!r}", _pytest("-o", f"vram_tolerance={text}"), ("vram_tolerance",)
        )
    yield from _plan()
    yield from _virtual_gpu()
    yield from _plugin()
    yield from _others()


def _json(words: tuple[str, ...], target: str) -> Callable[[Place], list[str]]:
    return lambda place: [*_fixed(*words)(place), "--json", str(place.folder) if target == "GOOD" else target]


def _pytest(*words: str) -> Callable[[Place], list[str]]:
    def made(place: Place) -> list[str]:
        (place.folder / "test_it.py").write_text("def test_it():\n    pass\n")
        return [
            "-p",
            "no:cacheprovider",
            "-q",
            "--rootdir",
            str(place.folder),
            "-c",
            "/dev/null",
            *words,
            str(place.folder),
        ]

    return made


def _of_numbers(command: str, flags: tuple[str, ...], allowed: tuple[str, ...] = ()) -> Iterator[Case]:
    for flag in flags:
        for text in _NUMBERS:
            if text not in allowed:
                yield Case(command, f"{flag}: {text[:40]!r}", _fixed(*_good(command), f"{flag}={text}"), (flag,))


def _plan() -> Iterator[Case]:
    config = ("--config", "GOOD/good.yaml")
    for what, words, says in [
        ("no card", config, "--card"),
        ("a card without a name", (*config, "--card"), "--card"),
        ("an unknown card", (*config, "--card", "rtx-9999"), "rtx-9999"),
        ("an empty card", (*config, "--card", ""), "card"),
        ("an unknown card among known ones", (*config, "--card", "t4-16gb", "x-1gb"), "x-1gb"),
        ("--gpu without one", (*config, "--gpu"), ""),
        ("--gpu and --memory", (*config, "--gpu", "--memory", "8GB"), "--memory"),
        ("--seq beyond --limit", (*config, "--card", "12GB", "--seq", "4096", "--limit", "1024"), "--seq"),
        ("--write without a suffix", (*config, "--card", "12GB", "--write", "x"), "--write"),
        ("--write over a file", (*config, "--card", "12GB", "--write", "GOOD/good.yaml"), "--force"),
        ("--write to nowhere", (*config, "--card", "12GB", "--write", "/nowhere/x.yaml"), "--write"),
        ("--write into no folder", (*config, "--card", "12GB", "--write", "GOOD/good.txt/x.yaml"), "--write"),
        ("--write of many pairs", (*config, "--card", "12GB", "24GB", "--write", "NEW/x.yaml"), "--write"),
        ("--write with a name too long", (*config, "--card", "12GB", "--write", "x" * 300 + ".yaml"), "too long"),
        ("an unknown model", ("--model", "granite-9", "--card", "12GB", "--no-cache"), "base.model"),
        ("a model folder that is empty", ("--model", "GOOD/empty", "--card", "12GB", "--no-cache"), "config.json"),
        ("two bad recipes", ("--config", "GOOD/none.yaml", "GOOD/none2.yaml", "--card", "12GB"), "none.yaml"),
        ("a recipe that is samples", ("--config", "GOOD/data.jsonl", "--card", "12GB"), "data.jsonl"),
    ]:
        yield Case("plan", what, _fixed(*words), (says,) if says else ())


def _virtual_gpu() -> Iterator[Case]:
    card = ("--card", "12GB")
    for what, words, says in [
        ("nothing", (), "--card"),
        ("no card", ("--", "true"), "--card"),
        ("no command", card, "--"),
        ("an unknown card", ("--card", "rtx-9999", "--", "true"), "rtx-9999"),
        ("an empty card", ("--card", "", "--", "true"), "card"),
        ("a card of nothing", ("--card", "0GB", "--", "true"), "card"),
        ("a card of 30 digits", ("--card", f"{_LONG}GB", "--", "true"), "card"),
        ("an unknown command", (*card, "--", "nonesuch-program"), "nonesuch-program"),
        ("a command that is a folder", (*card, "--", "/tmp"), "/tmp"),
        ("a command that is no program", (*card, "--", "GOOD/data.jsonl"), "data.jsonl"),
        ("an empty command", (*card, "--", ""), ""),
        ("a command of 5,000 letters", (*card, "--", "x" * 5000), ""),
        ("no cards", (*card, "--count", "0", "--", "true"), "--count"),
        ("17 cards", (*card, "--count", "17", "--", "true"), "--count"),
        ("half a card", (*card, "--count", "0.5", "--", "true"), "--count"),
        ("30 digits of cards", (*card, "--count", _LONG, "--", "true"), "--count"),
        ("5,000 digits of cards", (*card, "--count", "9" * 5000, "--", "true"), "--count"),
        ("a superscript of cards", (*card, "--count", "²", "--", "true"), "--count"),
        ("--json to nowhere", (*card, "--json", "/nowhere/x", "--", "true"), "/nowhere/x"),
        ("--json to a folder", (*card, "--json", "/tmp", "--", "true"), "/tmp"),
        ("--json to nothing", (*card, "--json", "", "--", "true"), ""),
        ("an unknown flag", (*card, "--nonesuch", "--", "true"), "--nonesuch"),
        ("a flag without its value", ("--card",), "--card"),
    ]:
        yield Case("virtual-gpu", what, _fixed(*words), (says,) if says else ())


def _plugin() -> Iterator[Case]:
    for what, words, says in [
        ("an unknown card", ("--vram-card=rtx-9999",), "rtx-9999"),
        ("a card of 30 digits", (f"--vram-card={_LONG}GB",), "--vram-card"),
        ("a card of a byte", ("--vram-card=1B",), "--vram-card"),
        ("an unknown card in the ini file", ("-o", "vram_card=rtx-9999"), "rtx-9999"),
        ("a cap of no real card", ("--vram-cap=6GB",), "--vram-cap"),
        ("a cap that is none", ("--vram-gpu", "--vram-cap=x"), "--vram-cap"),
        ("a card beside a real one", ("--vram-gpu", "--vram-card=12GB"), "--vram-card"),
        ("a budget in the ini file", ("-o", "vram_budget=much"), "vram_budget"),
        ("a share that is none", ("-o", "vram_tolerance_relative=2"), "vram_tolerance_relative"),
        ("a share that is nan", ("-o", "vram_tolerance_relative=nan"), "vram_tolerance_relative"),
        ("a negative tolerance", ("-o", "vram_reserved_tolerance=-1 MiB"), "vram_reserved_tolerance"),
        ("an unknown option", ("--vram-nonesuch",), "--vram-nonesuch"),
        ("a record that is a path", ("--vram-record", "GOOD/results"), "--vram-record"),
    ]:
        yield Case("pytest", what, lambda place, words=words: _pytest(*_fixed(*words)(place))(place), (says,))


def _others() -> Iterator[Case]:
    for command, what, words, says in [
        ("watch", "--pid and --output-dir", ("--pid", "1", "--output-dir", "x"), "--pid"),
        ("watch", "no such process", ("--pid", "4194000"), "--pid"),
        ("watch", "an output folder that is not there", ("--output-dir", "/nowhere"), "/nowhere"),
        ("watch", "an output folder of nothing", ("--output-dir", "GOOD/empty"), "empty"),
        ("watch", "an output folder that is a file", ("--output-dir", "GOOD/good.txt"), "good.txt"),
        ("watch", "an output folder of nobody's", ("--output-dir", "~nobody9/x"), "nobody9"),
        ("watch", "an output folder with a name too long", ("--output-dir", "x" * 5000), "--output-dir"),
        ("data", "an unknown action", ("chekc", "GOOD/data.jsonl"), "chekc"),
        ("data", "no file", ("check",), "FILE"),
        ("data", "no target", ("convert", "GOOD/data.jsonl"), "OUT.jsonl"),
        ("data", "a target of another kind", ("convert", "GOOD/data.jsonl", "x.txt"), "x.txt"),
        ("data", "a target that is there", ("convert", "GOOD/data.jsonl", "GOOD/held-out.jsonl"), "--force"),
        ("data", "a target nowhere", ("convert", "GOOD/data.jsonl", "/nowhere/x.jsonl"), "/nowhere"),
        ("data", "a target with a name too long", ("convert", "GOOD/data.jsonl", "x" * 300 + ".jsonl"), "xxx"),
        (
            "data",
            "keys of two formats",
            ("convert", "GOOD/data.jsonl", "NEW/x.jsonl", "--text", "a", "--messages", "b"),
            "--text",
        ),
        ("data", "a key that is not there", ("convert", "GOOD/data.jsonl", "NEW/x.jsonl", "--text", "a"), "'a'"),
        ("data", "an empty key", ("convert", "GOOD/data.jsonl", "NEW/x.jsonl", "--text", ""), "''"),
        ("data", "a hub data set", ("check", "nobody/nothing"), "nobody/nothing"),
        ("data", "a hub data set's split", ("check", "nobody/nothing:no[ne"), "nobody/nothing"),
        ("generate", "no prompt", ("--run", "GOOD/run"), "--prompt"),
        ("generate", "no run", ("--prompt", "a"), "--run"),
        ("generate", "a run that is not there", ("--run", "/nowhere", "--prompt", "a"), "/nowhere"),
        ("generate", "a run that is a file", ("--run", "GOOD/good.txt", "--prompt", "a"), "good.txt"),
        ("generate", "a run of nothing", ("--run", "GOOD/empty", "--prompt", "a"), "recipe.json"),
        ("generate", "a run with a name too long", ("--run", "x" * 5000, "--prompt", "a"), "--run"),
        ("generate", "a run of nobody's", ("--run", "~nobody9/x", "--prompt", "a"), "nobody9"),
        ("generate", "an unknown device", ("--run", "GOOD/run", "--prompt", "a", "--device", "tpu"), "tpu"),
        ("generate", "no GPU", ("--run", "GOOD/run", "--prompt", "a", "--device", "cuda"), "cuda"),
        (
            "generate",
            "more tokens than a context",
            ("--run", "GOOD/run", "--prompt", "a", "--max-new-tokens", str(2**40)),
            "--max-new-tokens",
        ),
        ("merge", "a run that is not there", ("--run", "/nowhere", "--to", "NEW/x"), "/nowhere"),
        ("merge", "a run of nothing", ("--run", "GOOD/empty", "--to", "NEW/x"), "recipe.json"),
        ("merge", "a run with a name too long", ("--run", "x" * 5000, "--to", "NEW/x"), "--run"),
        ("merge", "a target that is there", ("--run", "GOOD/run", "--to", "GOOD/results"), "--to"),
        ("merge", "a target that is a file", ("--run", "GOOD/run", "--to", "GOOD/good.txt"), "--to"),
        ("merge", "a target in a file", ("--run", "GOOD/run", "--to", "GOOD/good.txt/x"), "--to"),
        ("merge", "a target without a name", ("--run", "GOOD/run", "--to", ""), "--to"),
        ("merge", "a target of blanks", ("--run", "GOOD/run", "--to", "  "), "--to"),
        ("merge", "a target with a name too long", ("--run", "GOOD/run", "--to", "/tmp/" + "x" * 300), "--to"),
        ("merge", "a target that cannot be made", ("--run", "GOOD/run", "--to", "/proc/x"), "--to"),
        ("merge", "an unknown dtype", ("--run", "GOOD/run", "--to", "NEW/x", "--dtype", "int8"), "--dtype"),
        ("merge", "an unknown device", ("--run", "GOOD/run", "--to", "NEW/x", "--device", "tpu"), "--device"),
        ("report", "a folder that is not there", ("/nowhere",), "/nowhere"),
        ("report", "a folder of nothing", ("GOOD/empty",), "empty"),
        ("report", "a page nowhere", (_RESULTS, "--output", "/nowhere/x.html"), "--output"),
        ("report", "a page that is a folder", (_RESULTS, "--output", "GOOD/empty"), "empty"),
        ("report", "a page without a name", (_RESULTS, "--output", ""), ""),
        ("report", "a page with a name too long", (_RESULTS, "--output", "x" * 300), "xxx"),
        ("report", "charts in a file", (_RESULTS, "--charts", "GOOD/good.txt"), "--charts"),
        ("readme", "results nowhere", ("--results", "/nowhere"), "/nowhere"),
        ("readme", "a page nowhere", ("--results", "results", "--readme", "/nowhere"), "/nowhere"),
        ("readme", "a page that is a folder", ("--results", "results", "--readme", "GOOD/empty"), "empty"),
        ("readme", "a page without markers", ("--results", "results", "--readme", "GOOD/good.txt"), "markers"),
        (
            "bisect",
            "constraints nowhere",
            ("--good", "/nowhere", "--bad", "GOOD/bad.txt", "--config", "GOOD/good.yaml"),
            "/nowhere",
        ),
        (
            "bisect",
            "nothing differs",
            ("--good", "GOOD/good.txt", "--bad", "GOOD/good.txt", "--config", "GOOD/good.yaml"),
            "--good",
        ),
        (
            "bisect",
            "a recipe nowhere",
            ("--good", "GOOD/good.txt", "--bad", "GOOD/bad.txt", "--config", "/nowhere.yaml"),
            "/nowhere.yaml",
        ),
        (
            "bisect",
            "an unknown card",
            ("--good", "GOOD/good.txt", "--bad", "GOOD/bad.txt", "--config", "GOOD/good.yaml", "--card", "rtx-9999"),
            "rtx-9999",
        ),
        ("nonesuch", "an unknown command", (), "nonesuch"),
        ("trian", "a misspelt command", (), "train"),
        ("--nonesuch", "an unknown flag for a command", (), "--nonesuch"),
    ]:
        yield Case(command, what, _fixed(*words), (says,) if says else ())
