"""Step 3b, test a trained network: python -m deeplab.test --help"""

from functools import partial

from deeplab.recipe import RECIPE
from pipeline.run import command
from training import test

main = partial(test.main, RECIPE)

if __name__ == "__main__":
    command(main)
