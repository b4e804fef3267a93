"""``make list``."""

from __future__ import annotations

from collections.abc import Mapping

from harness.errors import UserError, nearest
from harness.experiment import command_line
from harness.experiment.catalog import Catalog, load_catalog
from harness.experiment.experiment import Experiment
from harness.system import screen


def list_experiments(settings: Mapping[str, str]) -> int:
    """Print the experiments of CHAPTER and MODEL on at most GPUS, by chapter."""
    catalog = load_catalog()
    wanted = [each for each in catalog.experiments if _matches(each, settings, catalog)]
    if not wanted:
        raise UserError(
            "no experiment matches " + " ".join(f"{k}={v}" for k, v in settings.items())
        )
    name_width = max(len(each.name) for each in wanted)
    layout_width = max(len(each.layout) for each in wanted)
    for number, title in catalog.chapters.items():
        rows = [each for each in wanted if each.chapter == number]
        if rows:
            print(f"\n{number}  {title}")
        for each in rows:
            gpus = f"{each.world_size} GPU{'s' if each.world_size > 1 else ' '}"
            row = f"  {each.name:{name_width}}  {gpus:>7}  {each.layout:{layout_width}}"
            if screen.width(piped=1000) < len(row) + 40:  # too narrow for another column
                screen.say(row.rstrip(), hang=6)
                screen.say(f"      {each.shows}", hang=6)
            else:
                screen.say(f"{row}  {each.shows}", hang=len(row) + 2)
    print()
    screen.say(
        f"{len(wanted)} experiments. make {wanted[0].id} runs one, make show-{wanted[0].id} prints"
        " its command."
    )
    return 0


def _matches(experiment: Experiment, settings: Mapping[str, str], catalog: Catalog) -> bool:
    if "CHAPTER" in settings:
        chapter = command_line.count("CHAPTER", settings["CHAPTER"])
        catalog.in_chapter(chapter)
        if experiment.chapter != chapter:
            return False
    if "MODEL" in settings:
        models = sorted({each.model.name for each in catalog.experiments})
        if not any(settings["MODEL"] in model for model in models):
            raise UserError(f"MODEL={settings['MODEL']}; {nearest(settings['MODEL'], models)}")
        if settings["MODEL"] not in experiment.model.name:
            return False
    return "GPUS" not in settings or experiment.world_size <= command_line.count(
        "GPUS", settings["GPUS"]
    )
