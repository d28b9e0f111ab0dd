"""What watches the services: Prometheus's and Grafana's configuration, and the dashboards."""
