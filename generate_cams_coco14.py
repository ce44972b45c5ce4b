"""Step 1 on COCO 2014. See python generate_cams_coco14.py --help"""
from pipeline.cams_cli import main
from pipeline.run import command

if __name__ == "__main__":
    command(lambda: main("coco14"))
