"""python -m moepress.stages TASK.yaml OUT"""

from moepress.artefacts import stage_main

stage_main()
