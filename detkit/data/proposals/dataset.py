"""A data set with proposals, and the checks that a config has proposals if and only if the head needs them."""

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import Tensor

from detkit.data.dataset import Dataset
from detkit.data.dataset_wrapper import DatasetWrapper
from detkit.data.proposals.cache import ProposalCache, default_folder
from detkit.data.proposals.sources import ProposalSource
from detkit.errors import ConfigError
from detkit.io.terminal import Console
from detkit.registry import option_names, proposal_sources
from detkit.structures import Sample

CACHE_KEY = "cache"


def build_source(options: Mapping[str, Any], split: str | None = None) -> ProposalSource:
    """Build the source of a config's `proposals`.

    Args:
        options: `name` of a source, its options, and optionally `cache`, the folder of the cache.
        split: the split of the data set; None for images outside a data set.

    Raises:
        ConfigError: the name or an option is unknown, the source only supports images of a data set, or `cache` is
            given although nothing is cached.
    """
    given = {key: value for key, value in options.items() if key != CACHE_KEY}
    if "name" not in given:
        raise ConfigError(f"'proposals' needs a 'name'. Valid names: {', '.join(proposal_sources.names())}.")
    part: type[ProposalSource] = proposal_sources.get(str(given["name"]))  # type: ignore[assignment]
    if split is None and not part.from_pixels:
        raise ConfigError(
            f"The source of proposals '{given['name']}' only supports images of a data set, not new images. Use "
            "another: detkit infer RUN --proposals '{name: selective_search}', or "
            "detkit.load(RUN, proposals={'name': 'selective_search'})."
        )
    folder = options.get(CACHE_KEY)
    if folder is not None and (split is None or not part.from_pixels):
        reason = (
            "proposals of new images are not cached"
            if split is None
            else f"the source '{given['name']}' computes nothing"
        )
        raise ConfigError(f"'proposals.cache' is '{folder}', but {reason}. Remove it.")
    if not isinstance(folder, str | None):
        raise ConfigError(f"'proposals.cache' must be the path of a folder, but is {folder!r}.")
    injected = {"split": split} if "split" in option_names(part) else {}
    source: ProposalSource = proposal_sources.build(given, "proposals", (CACHE_KEY,), **injected)
    return source


def check_needed(options: Mapping[str, Any] | None, needs: frozenset[str], head: str) -> None:
    """Check that a config has proposals if and only if the head needs them.

    Args:
        options: a config's `proposals`.
        needs: the needs of the head.
        head: the name of the head.

    Raises:
        ConfigError: proposals are missing or unused.
    """
    if "proposals" in needs and options is None:
        raise ConfigError(
            f"The head '{head}' needs proposals, but the config has none. Add proposals: {{name: selective_search}}, "
            "or on the command line --proposals '{name: selective_search}'. "
            f"Sources: {', '.join(proposal_sources.names())}."
        )
    if "proposals" not in needs and options is not None:
        raise ConfigError(
            f"The config has 'proposals' ({options.get('name')}), but the head '{head}' does not use them. Remove "
            "'proposals', or choose a head that does."
        )


def without_new_cache(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove the cache from the options of a source, unless its folder exists.

    The options come from a checkpoint, which may be untrusted and must not create folders.
    """
    if options is None or os.path.isdir(str(options.get(CACHE_KEY) or ".")):
        return options
    return {key: value for key, value in options.items() if key != CACHE_KEY}


def with_proposals(
    dataset: Dataset, options: Mapping[str, Any] | None, split: str, title: str, quiet: bool = False
) -> Dataset:
    """Add proposals to a data set, all computed or checked; without options return it unchanged.

    Args:
        options: a config's `proposals`.
        split: the name of the split, for the source.
        title: name of the data set in the report: "training".
        quiet: print nothing.

    Raises:
        ConfigError: an option is unknown, or the cache cannot be written.
        DataError: the source does not match the data set, or an image cannot be read.
    """
    if options is None:
        return dataset
    folder = options.get(CACHE_KEY)
    source = build_source(options, split)
    proposed = ProposalDataset(dataset, source, default_folder() if folder is None else Path(folder).expanduser())
    console = Console(quiet=quiet)
    console.print(f"proposals  {title}: {proposed.prepare(console)}")
    return proposed


class ProposalDataset(DatasetWrapper):
    """A wrapper that adds proposals to the samples of a data set.

    Args:
        dataset: the data set without proposals.
        source: the source of the proposals.
        folder: the folder of the cache, for a source that computes them from pixels.
    """

    def __init__(self, dataset: Dataset, source: ProposalSource, folder: Path) -> None:
        super().__init__(dataset)
        self.fields = dataset.fields | {"proposals"}
        self.proposer = source
        self.cache = ProposalCache(source, folder) if source.from_pixels else None

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        return Sample(sample.image, sample.target, sample.meta, self._proposals(sample)[0])

    def prepare(self, console: Console) -> str:
        """Compute the proposals of all images into the cache, or check them.

        In threads, since kernels, image decoders and the hash release the GIL, and threads share the compiled kernel,
        while each process would load torch and the kernel again.

        Returns:
            A line for the report.
        """
        if self.cache is None:
            return self.proposer.check(self)
        counts: Counter[str] = Counter()
        total = 0
        with ThreadPoolExecutor(max_workers=usable_processors()) as pool:
            done = pool.map(self._prepare_one, range(len(self)))
            try:
                for count, outcome in track(
                    done,
                    "proposals",
                    total=len(self),
                    console=console,
                    disable=not console.is_terminal,
                    transient=True,
                ):
                    counts[outcome] += 1
                    counts["without"] += not count
                    total += count
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        line = (
            f"{counts['computed'] + counts['broken']:,} computed, {counts['cached']:,} from the cache, mean "
            f"{total / max(1, len(self)):,.0f} proposals per image, {counts['without']:,} images without"
        )
        if counts["broken"]:
            line += f"; {counts['broken']:,} damaged files in the cache were computed again"
        return line

    def _prepare_one(self, index: int) -> tuple[int, str]:
        proposals, outcome = self._proposals(self.dataset[index])
        return len(proposals), outcome

    def _proposals(self, sample: Sample) -> tuple[Tensor, str]:
        if self.cache is None:
            return self.proposer(sample.image, sample.meta.image_id), "read"
        return self.cache.get(sample.image, sample.meta.image_id)


def usable_processors() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
