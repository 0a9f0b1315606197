"""The plug-in of lmms-eval."""

import os

from places import ROOT

PLUGIN = ROOT / "scripts" / "lmms_plugin"


def installed_plugin(folder):
    """A search path on which the plug-in counts as installed."""
    (folder / "rediprune_lmms_eval-0.1.0.dist-info").mkdir()
    for name, text in {
        "METADATA": "Metadata-Version: 2.1\nName: rediprune-lmms-eval\nVersion: 0.1.0\n",
        "entry_points.txt": "[lmms_eval.models]\nrediprune = rediprune_lmms_eval:manifest\n",
    }.items():
        (folder / "rediprune_lmms_eval-0.1.0.dist-info" / name).write_text(text)
    return os.pathsep.join(map(str, (folder, PLUGIN)))
