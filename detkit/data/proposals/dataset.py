"""A data set whose samples carry proposals, and the checks that a config asks for them where they are needed."""

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
    """The source that a config's `proposals` describes.

    Args:
        options: `name` of a source, its options, and optionally `cache`, the folder of the cache.
        split: of the data set that the source is for; None for images of no data set.

    Raises:
        ConfigError: the name or an option is unknown, the source is for images of a data set only, or `cache` is
            given where nothing is cached.
    """
    given = {key: value for key, value in options.items() if key != CACHE_KEY}
    if "name" not in given:
        raise ConfigError(f"'proposals' needs a 'name'. Valid names: {', '.join(proposal_sources.names())}.")
    part: type[ProposalSource] = proposal_sources.get(str(given["name"]))  # type: ignore[assignment]
    if split is None and not part.from_pixels:
        raise ConfigError(
            f"The source of proposals '{given['name']}' knows the images of a data set only, and has none for new "
            "images. Give another: detkit infer RUN --proposals '{name: selective_search}', or "
            "detkit.load(RUN, proposals={'name': 'selective_search'})."
        )
    folder = options.get(CACHE_KEY)
    if folder is not None and (split is None or not part.from_pixels):
        reason = "new images are not kept" if split is None else f"the source '{given['name']}' computes nothing"
        raise ConfigError(f"'proposals.cache' is '{folder}', but {reason}. Remove it.")
    if not isinstance(folder, str | None):
        raise ConfigError(f"'proposals.cache' must be the path of a folder, but is {folder!r}.")
    injected = {"split": split} if "split" in option_names(part) else {}
    source: ProposalSource = proposal_sources.build(given, "proposals", (CACHE_KEY,), **injected)
    return source


def check_needed(options: Mapping[str, Any] | None, needs: frozenset[str], head: str) -> None:
    """Refuse proposals that are missing, and those that nothing would read.

    Args:
        options: a config's `proposals`.
        needs: of the head.
        head: its name.

    Raises:
        ConfigError: in both cases.
    """
    if "proposals" in needs and options is None:
        raise ConfigError(
            f"The head '{head}' needs proposals, but the config has none. Add proposals: {{name: selective_search}}, "
            "or on the command line --proposals '{name: selective_search}'. "
            f"Sources: {', '.join(proposal_sources.names())}."
        )
    if "proposals" not in needs and options is not None:
        raise ConfigError(
            f"The config has 'proposals' ({options.get('name')}), but the head '{head}' does not read them. Remove "
            "'proposals', or use a head that does."
        )


def without_new_cache(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """The options of a source of proposals without its cache, unless that folder is there already.

    They come from a checkpoint, which may be a stranger's: it may not say where a folder is made.
    """
    if options is None or os.path.isdir(str(options.get(CACHE_KEY) or ".")):
        return options
    return {key: value for key, value in options.items() if key != CACHE_KEY}


def with_proposals(
    dataset: Dataset, options: Mapping[str, Any] | None, split: str, title: str, quiet: bool = False
) -> Dataset:
    """The same data set with proposals in its samples, all of them computed or checked; without options as it is.

    Args:
        options: a config's `proposals`.
        split: the name of the split, for the source.
        title: names the data set in the report: "training".
        quiet: print nothing.

    Raises:
        ConfigError: an option is unknown, or the cache cannot be written.
        DataError: the source does not fit the data set, or an image cannot be read.
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
    """Another data set, each of whose samples gets proposals; everything else is that data set's.

    Args:
        dataset: without proposals.
        source: of the proposals.
        folder: of the cache, for a source that computes them from the pixels.
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
        """Have the proposals of all images in the cache, or checked.

        In threads: a source's kernels, the decoders of images and the hash run without Python's lock, and threads
        share one compiled kernel, where each process would load torch and compile or load it again.

        Returns:
            A line about it for people.
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
            f"{total / max(1, len(self)):,.0f} proposals an image, {counts['without']:,} images without"
        )
        if counts["broken"]:
            line += f"; {counts['broken']:,} of the computed had a damaged file in the cache"
        return line

    def _prepare_one(self, index: int) -> tuple[int, str]:
        proposals, outcome = self._proposals(self.dataset[index])
        return len(proposals), outcome

    def _proposals(self, sample: Sample) -> tuple[Tensor, str]:
        if self.cache is None:
            return self.proposer(sample.image, sample.meta.image_id), "read"
        return self.cache.get(sample.image, sample.meta.image_id)


def usable_processors() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
