"""Monitoring of the services: configuration of Prometheus and Grafana, and the dashboards."""
