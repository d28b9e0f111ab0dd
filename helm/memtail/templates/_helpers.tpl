{{/* Prefix of names: the release's name, followed by the chart's unless it contains that. Every template begins with it, hence the check. */}}
{{- define "memtail.fullname" -}}
{{- if not (hasKey .Values.serviceAccount "componentAnnotations") -}}
{{- fail "the values of an earlier chart lack keys of this one: use --reset-then-reuse-values instead of --reuse-values" -}}
{{- end -}}
{{- $name := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Labels that select pods. Takes (root, component); if component is empty, all pods of the release. */}}
{{- define "memtail.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* Labels of an object. Takes (root, component). */}}
{{- define "memtail.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{ include "memtail.selector" . }}
{{- end }}

{{/* Labels of pods, including the user's. Takes (root, component, its values). */}}
{{- define "memtail.podLabels" -}}
{{- include "memtail.selector" . }}
{{- with (index . 2).labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Reference of an image. Takes (its values, the default tag). */}}
{{- define "memtail.image" -}}
{{- $image := index . 0 -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default (index . 1) }}{{ end }}
{{- end }}

{{/* Mode of starting workers: jobs, deployment or keda. */}}
{{- define "memtail.mode" -}}
{{- .Values.workers.mode | default (.Values.rbac.create | ternary "jobs" "deployment") -}}
{{- end }}

{{/* Password: the cluster's existing one, else a new one, generated once per rendering. Takes (root, key in the Secret). */}}
{{- define "memtail.password" -}}
{{- $root := index . 0 -}}
{{- if not (hasKey $root.Values "passwords") -}}
{{- $kept := (lookup "v1" "Secret" $root.Release.Namespace (include "memtail.fullname" $root)).data | default dict -}}
{{- $passwords := dict -}}
{{- $names := list "redis-password" "redis-password-worker" "redis-password-dispatcher" "s3-access-key" "s3-secret-key" "explorer-token" -}}
{{- range include "memtail.s3Users" $root | fromJsonArray -}}
{{- $names = append $names (printf "s3-secret-key-%s" .) -}}
{{- end -}}
{{- range $names -}}
{{- $_ := set $passwords . (hasKey $kept . | ternary (get $kept . | b64dec) (randAlphaNum 32)) -}}
{{- end -}}
{{- $_ := set $root.Values "passwords" $passwords -}}
{{- end -}}
{{- get $root.Values.passwords (index . 1) -}}
{{- end }}

{{/* Components with a user on the bundled S3 server, as JSON; services/tools/rights.py has their policies. */}}
{{- define "memtail.s3Users" -}}
["worker", "dispatcher", "aggregator", "explorer", "client"]
{{- end }}

{{/* Secret and key of Redis's URL, as YAML; empty if the component does not connect to Redis. Takes (root, component). */}}
{{- define "memtail.brokerSecret" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $external := $root.Values.externalRedis -}}
{{- if has $component (list "worker" "dispatcher") -}}
{{- if $root.Values.redis.enabled -}}
{name: {{ include "memtail.fullname" $root }}, items: [{key: broker-{{ $component }}, path: broker}]}
{{- else if $external.url -}}
{name: {{ include "memtail.fullname" $root }}, items: [{key: broker, path: broker}]}
{{- else -}}
{name: {{ get $external.componentSecrets $component | default $external.existingSecret }}, items: [{key: {{ $external.existingSecretKey }}, path: broker}]}
{{- end -}}
{{- end -}}
{{- end }}

{{/*
Secret with a component's keys of the bucket, as YAML; empty if its pods use the identity of their service account. Takes (root, component);
the component "administrator" has the key of the bundled server, and the keys of all components.
*/}}
{{- define "memtail.s3Secret" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- if eq $component "administrator" -}}
{{- $items := list (dict "key" "s3-access-key" "path" "s3-access-key") (dict "key" "s3-secret-key" "path" "s3-secret-key") -}}
{{- range include "memtail.s3Users" $root | fromJsonArray -}}
{{- $items = append $items (dict "key" (printf "s3-secret-key-%s" .) "path" (printf "s3-secret-key-%s" .)) -}}
{{- end -}}
{{- dict "name" (include "memtail.fullname" $root) "items" $items | toYaml -}}
{{- else if $root.Values.minio.enabled -}}
{name: {{ include "memtail.fullname" $root }}, items: [{key: s3-access-key-{{ $component }}, path: s3-access-key}, {key: s3-secret-key-{{ $component }}, path: s3-secret-key}]}
{{- else -}}
{{- with get $root.Values.externalS3.componentSecrets $component | default $root.Values.externalS3.existingSecret -}}
{name: {{ . }}, items: [{key: access-key, path: s3-access-key}, {key: secret-key, path: s3-secret-key}]}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Environment variables for connections to the bucket and to Redis, and limits on experiments. Takes (root, component). */}}
{{- define "memtail.connections" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.limits }}
- {name: MEMTAIL_MAX_TRIALS, value: {{ int64 .maxTrials | quote }}}
- {name: MEMTAIL_MAX_SHARDS, value: {{ int64 .maxShards | quote }}}
{{- end }}
{{- if include "memtail.brokerSecret" . }}
- {name: MEMTAIL_BROKER_FILE, value: /run/memtail/broker}
{{- end }}
{{- if include "memtail.s3Secret" . }}
- {name: MEMTAIL_S3_ACCESS_KEY_FILE, value: /run/memtail/s3-access-key}
- {name: MEMTAIL_S3_SECRET_KEY_FILE, value: /run/memtail/s3-secret-key}
{{- end }}
{{- if $root.Values.minio.enabled }}
- {name: MEMTAIL_STORE, value: "s3://{{ $root.Values.minio.bucket }}"}
- {name: MEMTAIL_S3_ENDPOINT, value: "http://{{ include "memtail.fullname" $root }}-minio:9000"}
{{- else }}
{{- with $root.Values.externalS3 }}
- {name: MEMTAIL_STORE, value: "s3://{{ .bucket }}{{ with trimAll "/" .prefix }}/{{ . }}{{ end }}"}
{{- with .endpoint }}
- {name: MEMTAIL_S3_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- with .region }}
- {name: MEMTAIL_S3_REGION, value: {{ . | quote }}}
{{- end }}
{{- with .addressing }}
- {name: MEMTAIL_S3_ADDRESSING, value: {{ . }}}
{{- end }}
{{- if or .ca.secret .ca.configMap }}
- {name: MEMTAIL_S3_CA_FILE, value: /run/memtail/ca.crt}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Volume of the files named by these variables; empty without files. Takes (root, component). */}}
{{- define "memtail.connectionFiles" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $ca := $root.Values.externalS3.ca -}}
{{- $sources := list -}}
{{- with include "memtail.brokerSecret" . -}}
{{- $sources = append $sources (dict "secret" (fromYaml .)) -}}
{{- end -}}
{{- with include "memtail.s3Secret" . -}}
{{- $sources = append $sources (dict "secret" (fromYaml .)) -}}
{{- end -}}
{{- if not $root.Values.minio.enabled -}}
{{- $items := list (dict "key" $ca.key "path" "ca.crt") -}}
{{- if $ca.secret -}}
{{- $sources = append $sources (dict "secret" (dict "name" $ca.secret "items" $items)) -}}
{{- else if $ca.configMap -}}
{{- $sources = append $sources (dict "configMap" (dict "name" $ca.configMap "items" $items)) -}}
{{- end -}}
{{- end -}}
{{- with $sources -}}
- name: {{ eq $component "administrator" | ternary "administrator" "connections" }}
  projected:
    defaultMode: 0440
    sources:
      {{- toYaml . | nindent 6 }}
{{- end }}
{{- end }}

{{/* Annotation that restarts pods when passwords change. */}}
{{- define "memtail.secretChecksum" -}}
checksum/secret: {{ include (print .Template.BasePath "/secret.yaml") . | sha256sum }}
{{- end }}

{{/* Security of every pod: not root, and volumes accessible to uid 1000. */}}
{{- define "memtail.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
enableServiceLinks: false
{{- end }}

{{/* Security of every container. */}}
{{- define "memtail.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Pull secrets and scheduling of pods. Takes (root, their values). */}}
{{- define "memtail.placement" -}}
{{- $values := index . 1 -}}
{{- with (index . 0).Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- range list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- if get $values . }}
{{ pick $values . | toYaml }}
{{- end }}
{{- end }}
{{- end }}

{{/* Disruption budget that never blocks a drain: one pod may always be evicted. Takes (root, component). */}}
{{- define "memtail.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "memtail.fullname" (index . 0) }}-{{ index . 1 }}
  labels: {{ include "memtail.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {{ include "memtail.selector" . | nindent 6 }}
{{- end }}

{{/* GiB of a quantity, times a share of it. Takes (quantity, share). */}}
{{- define "memtail.gib" -}}
{{- $quantity := index . 0 | toString -}}
{{- $unit := regexFind "[a-zA-Z]*$" $quantity -}}
{{- $bytes := dict "" 1.0 "m" 1e-3 "k" 1e3 "K" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- divf (mulf (trimSuffix $unit $quantity | float64) (get $bytes $unit) (index . 1)) 1073741824.0 -}}
{{- end }}

{{/*
Value of MEMTAIL_CACHE_LIMIT in GiB; empty where the volume sets the limit. What the cache holds beside datasets has the rest of an emptyDir.
Takes (values of the cache, share of the datasets).
*/}}
{{- define "memtail.cacheLimit" -}}
{{- $cache := index . 0 -}}
{{- if eq ($cache.type | default "emptyDir") "emptyDir" -}}
{{- $size := include "memtail.gib" (list $cache.sizeLimit 1.0) | float64 -}}
{{- if gt ($cache.limit | default 0 | float64) $size -}}
{{- fail (printf "workers.cache.limit is %v GiB, more than workers.cache.sizeLimit, %s: lower the limit, or raise sizeLimit" $cache.limit $cache.sizeLimit) -}}
{{- end -}}
{{- $cache.limit | default (include "memtail.gib" (list $cache.sizeLimit (index . 1)) | float64 | printf "%.4g") -}}
{{- else if $cache.limit -}}
{{- $cache.limit -}}
{{- end -}}
{{- end }}

{{/* Resources of a container that fills an emptyDir, whose size is requested of the node. Takes (resources, size). */}}
{{- define "memtail.resourcesWithStorage" -}}
{{- $resources := deepCopy (index . 0) -}}
{{- $_ := set $resources "requests" (merge $resources.requests (dict "ephemeral-storage" (index . 1))) -}}
{{- toYaml $resources -}}
{{- end }}

{{/* Pod template of a worker. Takes (root, restartPolicy). */}}
{{- define "memtail.worker" -}}
{{- $root := index . 0 -}}
{{- $values := $root.Values.workers -}}
{{- $gpus := int $values.gpus -}}
{{- $resources := deepCopy $values.resources -}}
{{- if $gpus -}}
{{- $_ := set $resources "limits" (set (get $resources "limits" | default dict) $values.gpuResource $gpus) -}}
{{- end -}}
{{- if eq $values.cache.type "emptyDir" -}}
{{- $resources = include "memtail.resourcesWithStorage" (list $resources $values.cache.sizeLimit) | fromYaml -}}
{{- end -}}
{{- $files := include "memtail.connectionFiles" (list $root "worker") -}}
metadata:
  labels: {{ include "memtail.podLabels" (list $root "worker" $values) | nindent 4 }}
  annotations:
    {{- include "memtail.secretChecksum" $root | nindent 4 }}
    {{- with $values.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  restartPolicy: {{ index . 1 }}
  terminationGracePeriodSeconds: {{ int $values.terminationGracePeriodSeconds }}
  serviceAccountName: {{ include "memtail.fullname" $root }}
  automountServiceAccountToken: false
  {{- include "memtail.podSecurity" $root | nindent 2 }}
  {{- include "memtail.placement" (list $root $values) | indent 2 }}
  containers:
    - name: worker
      image: {{ include "memtail.image" (list $root.Values.image.worker $root.Chart.AppVersion) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      # the entrypoint of the image reaps orphans of models
      args: [python, -m, services.worker]
      {{- include "memtail.containerSecurity" $root | nindent 6 }}
      env:
        {{- include "memtail.connections" (list $root "worker") | indent 8 }}
        - name: MEMTAIL_DEVICES
          value: {{ range $index := until $gpus }}{{ if $index }},{{ end }}cuda:{{ $index }}{{ else }}auto{{ end }}
        - {name: MEMTAIL_HEARTBEAT_FILE, value: /tmp/heartbeat}
        - {name: MEMTAIL_NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: MEMTAIL_CACHE, value: /var/cache/memtail}
        {{- with include "memtail.cacheLimit" (list $values.cache 0.95) }}
        - {name: MEMTAIL_CACHE_LIMIT, value: {{ . | quote }}}
        {{- end }}
        {{- if ne (include "memtail.mode" $root) "deployment" }}
        - {name: MEMTAIL_REST_SECONDS, value: "60"}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $values.extraEnvFrom }}
      envFrom: {{ toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - {name: metrics, containerPort: 9100}
      startupProbe:
        exec: {command: [python, -m, services.tools.healthcheck, /tmp/heartbeat]}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 60
      livenessProbe:
        exec: {command: [python, -m, services.tools.healthcheck, /tmp/heartbeat]}
        periodSeconds: 30
        timeoutSeconds: 10
      resources: {{ toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: cache, mountPath: /var/cache/memtail}
        - {name: shm, mountPath: /dev/shm}
        - {name: connections, mountPath: /run/memtail, readOnly: true}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {{- include "memtail.cacheVolume" $values.cache | nindent 6 }}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $values.sharedMemory }}}}
    {{- $files | nindent 4 }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* Volume of the workers' cache. Takes the values of the cache. */}}
{{- define "memtail.cacheVolume" -}}
name: cache
{{- if eq .type "hostPath" }}
hostPath: {path: {{ .path }}, type: Directory}
{{- else if eq .type "claim" }}
persistentVolumeClaim: {claimName: {{ required "workers.cache.type is claim: set workers.cache.claim" .claim }}}
{{- else }}
emptyDir: {sizeLimit: {{ .sizeLimit }}}
{{- end }}
{{- end }}

{{/* Pod template that fills the workers' cache, with a worker's keys of the bucket and without GPUs. Takes (root, command, placement, restartPolicy). */}}
{{- define "memtail.fill" -}}
{{- $root := index . 0 -}}
{{- $cache := $root.Values.workers.cache -}}
metadata:
  labels: {{ include "memtail.podLabels" (list $root "cache" $root.Values.workers) | nindent 4 }}
  annotations:
    {{- include "memtail.secretChecksum" $root | nindent 4 }}
spec:
  restartPolicy: {{ index . 3 }}
  serviceAccountName: {{ include "memtail.fullname" $root }}
  automountServiceAccountToken: false
  {{- include "memtail.podSecurity" $root | nindent 2 }}
  {{- include "memtail.placement" (list $root (index . 2)) | indent 2 }}
  containers:
    - name: fill
      image: {{ include "memtail.image" (list $root.Values.image.control $root.Chart.AppVersion) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: {{ toJson (index . 1) }}
      terminationMessagePolicy: FallbackToLogsOnError
      {{- include "memtail.containerSecurity" $root | nindent 6 }}
      env:
        {{- include "memtail.connections" (list $root "worker") | indent 8 }}
        - {name: MEMTAIL_CACHE, value: /var/cache/memtail}
        {{- with include "memtail.cacheLimit" (list $cache 0.95) }}
        - {name: MEMTAIL_CACHE_LIMIT, value: {{ . | quote }}}
        {{- end }}
        {{- with $root.Values.workers.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $root.Values.workers.extraEnvFrom }}
      envFrom: {{ toYaml . | nindent 8 }}
      {{- end }}
      resources:
        requests: {cpu: 250m, memory: 256Mi}
        limits: {memory: 1Gi}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: cache, mountPath: /var/cache/memtail}
        - {name: connections, mountPath: /run/memtail, readOnly: true}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {{- include "memtail.cacheVolume" $cache | nindent 6 }}
    {{- include "memtail.connectionFiles" (list $root "worker") | nindent 4 }}
{{- end }}

{{/* Spec of a Job of workers, without parallelism. Disruptions do not count as failures, and terminating pods are replaced only when they are gone. */}}
{{- define "memtail.workerJob" -}}
backoffLimit: 2147483647
ttlSecondsAfterFinished: 600
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
template: {{ include "memtail.worker" (list . "Never") | nindent 2 }}
{{- end }}

{{/* Selector of the pods of some components. Takes (root, components). */}}
{{- define "memtail.components" -}}
matchLabels: {{ include "memtail.selector" (list (index . 0) "") | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: {{ index . 1 | toJson }}}
{{- end }}

{{/* Port of a URL. Takes (URL, default port). */}}
{{- define "memtail.port" -}}
{{- $parts := index . 0 | urlParse -}}
{{- $port := regexFind ":[0-9]+$" $parts.host | trimPrefix ":" -}}
{{- if $port -}}
{{- $port -}}
{{- else -}}
{{- get (dict "http" 80 "https" 443 "redis" 6379 "rediss" 6379) $parts.scheme | default (index . 1) -}}
{{- end -}}
{{- end }}

{{/* Relabelings that set the labels service and release. Takes the kind of object that Prometheus discovers, service or pod. */}}
{{- define "memtail.relabelings" -}}
- {sourceLabels: [__meta_kubernetes_{{ . }}_label_app_kubernetes_io_component], targetLabel: service}
- {sourceLabels: [__meta_kubernetes_{{ . }}_label_app_kubernetes_io_instance], targetLabel: release}
{{- end }}

{{/* Whether the S3 server is scraped. Its metrics share the port of the objects, which must not be opened to all clients. */}}
{{- define "memtail.minioScraped" -}}
{{- $policy := .Values.networkPolicy -}}
{{- if and .Values.minio.enabled .Values.monitoring.serviceMonitor.enabled (or $policy.metricsFrom (not $policy.enabled)) -}}
true
{{- end -}}
{{- end }}
