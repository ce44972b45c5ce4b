"""Step 1 on PASCAL VOC 2012. See python generate_cams_voc12.py --help"""
from pipeline.cams_cli import main
from pipeline.run import command

if __name__ == "__main__":
    command(lambda: main("voc12"))
