"""`python -m services.monitoring.dashboards`."""

from services.monitoring.dashboards import FOLDER, rendered

if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in rendered().items():
        path.write_text(text)
