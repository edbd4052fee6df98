import sys

from moepress.tracking.mirror import main

main(sys.argv[1:])
