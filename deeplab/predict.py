"""Step 3c, segment images without labels: python -m deeplab.predict --help"""

from functools import partial

from deeplab.recipe import RECIPE
from pipeline.run import command
from training import predict

main = partial(predict.main, RECIPE)

if __name__ == "__main__":
    command(main, predict.AGAIN)
