"""What all stages of one preparation share: configuration, folders, salt, and the part of the work that is theirs.

OUT/train, OUT/val      shards, index, manifest: what training reads, and what may be published
OUT/rejected.csv        every row that did not become a sample, with its reason
OUT/report.html         counts, token lengths, coverage; OUT/duplicates.html: copies side by side
OUT/work                scanned images, plan, answers of models, salt: to be kept, and not to be published
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.config import EvaluationSet, LLMOptions, PrepareConfig
from data_prep.pool import ALL, Part
from data_prep.salt import make_salt
from data_prep.samples import Tools, make_tools
from data_prep.schema import SCHEMA_VERSION
from data_prep.sources import open_source
from data_prep.sources.base import Source


@dataclass(frozen=True)
class Job:
    config: PrepareConfig
    part: Part = ALL

    @property
    def out_dir(self) -> Path:
        return self.config.out_dir

    @property
    def work_dir(self) -> Path:
        return self.config.out_dir / "work"

    @property
    def whole_lock_path(self) -> Path:
        """Held by every job that is not a part of an array: such jobs never run at once."""
        return self.work_dir / ".whole.lock"

    @property
    def scan_dir(self) -> Path:
        return self.work_dir / "scan"

    def against_dir(self, evaluation_set: EvaluationSet) -> Path:
        """Another folder of images under the same name is scanned anew."""
        return self.work_dir / "against" / f"{evaluation_set.name}-{_digest(str(evaluation_set.path.absolute()))}"

    @cached_property
    def salt(self) -> str:
        return make_salt(self.work_dir)

    @cached_property
    def source(self) -> Source:
        return open_source(self.config.source, needs_caption=self.config.describer is None)

    @property
    def ledger_path(self) -> Path:
        """Where the models' answers are that shards are made from."""
        return self.work_dir / "answers.sqlite"

    @property
    def part_ledger_path(self) -> Path:
        """Where this part's answers go while it asks: parts share no file."""
        name = f"answers.part-{self.part.index}-of-{self.part.count}.sqlite"
        return self.ledger_path if self.part.count == 1 else self.work_dir / name

    @property
    def tools(self) -> Tools:
        return make_tools(self.config.model_dump_json(), self.ledger_path, self.salt)

    @property
    def asking_tools(self) -> Tools:
        """With this part's ledger, and its share of the limits: parts ask at once."""
        config = self.config.model_copy(
            update={
                name: options.shared_by(self.part.count)
                for name, options in (("describer", self.config.describer), ("decomposer", self.config.decomposer))
                if isinstance(options, LLMOptions)
            }
        )
        return make_tools(config.model_dump_json(), self.part_ledger_path, self.salt)

    @property
    def source_settings(self) -> str:
        """Names the configuration of the source; another one is expected to give other rows."""
        described = "described" if self.config.describer is not None else ""
        return _digest(self.config.model_dump_json(include={"name", "source"}), described, self.salt)

    @property
    def plan_settings(self) -> str:
        """Names all that a plan depends on, but the source's content and the images."""
        return _digest(
            self.source_settings, self.config.model_dump_json(include={"images", "duplicates", "val_fraction"})
        )

    @cached_property
    def config_digest(self) -> str:
        """Of the settings and lists that shape a sample: not where it goes, nor by how many processes."""
        relevant = self.config.model_dump(
            mode="json",
            include={"name", "ontology_min_similarity", "tokenizer", "images", "samples_per_shard"},
        )
        digest = hashlib.sha256(f"{SCHEMA_VERSION} {json.dumps(relevant, sort_keys=True)}".encode())
        for path in (self.config.ontology_path, self.config.concepts_path):
            digest.update(b"" if path is None else path.read_bytes())
        return digest.hexdigest()[:16]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]
