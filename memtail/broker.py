"""Keys and Lua scripts of the broker in Redis, which the services use and `memtail doctor` checks.

Scripts take their time from Redis's clock, so that the clocks of workers do not matter. Leases are the fields of one hash: an assignment's
id, with the time in ms at which its lease expires and the holder's name. An expired lease stays until `EXPIRED` removes it, which tells the
dispatcher that its holder was lost; a worker that ends removes its own.
"""

import hashlib

# Prefix of all keys. Its number is raised when earlier workers must not receive the messages: those of 0.1.0 read `memtail:`.
_PREFIX = "memtail2:"

_NOW = """
local time = redis.call('time')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# Reads a lease; a value that is no lease, or that expires later than ten leases from now, was not written by these scripts.
_READ = f"""{_NOW}
local function read(value, duration)
    local expiry, holder = string.match(value or '', '^(%d+) (.*)$')
    expiry = tonumber(expiry)
    if expiry and expiry <= now + 10 * duration then return expiry, holder end
end
"""
#: Acquires a lease: leases; id, holder, duration in ms.
ACQUIRE = f"""{_READ}
local expiry = read(redis.call('hget', KEYS[1], ARGV[1]), ARGV[3])
if expiry and expiry > now then return 0 end
redis.call('hset', KEYS[1], ARGV[1], string.format('%.0f %s', now + ARGV[3], ARGV[2]))
return 1
"""
#: Renews a lease, or acquires it again after Redis was flushed, unless another holder has it: leases; id, holder, duration in ms.
RENEW = f"""{_READ}
local expiry, holder = read(redis.call('hget', KEYS[1], ARGV[1]), ARGV[3])
if expiry and expiry > now and holder ~= ARGV[2] then return 0 end
redis.call('hset', KEYS[1], ARGV[1], string.format('%.0f %s', now + ARGV[3], ARGV[2]))
return 1
"""
#: Releases a lease if the name of its holder begins with a text: leases; id, text. A worker releases the leases of its dead processes.
RELEASE = """
local holder = string.match(redis.call('hget', KEYS[1], ARGV[1]) or '', '^%d+ (.*)$')
if not holder or string.sub(holder, 1, #ARGV[2]) ~= ARGV[2] then return 0 end
return redis.call('hdel', KEYS[1], ARGV[1])
"""
#: Removes the expired leases, and what is no lease, and returns ids and holders of the expired ones: leases; duration in ms.
EXPIRED = f"""{_READ}
local all, expired = redis.call('hgetall', KEYS[1]), {{}}
for field = 1, #all, 2 do
    local expiry, holder = read(all[field + 1], ARGV[1])
    if not expiry or expiry <= now then redis.call('hdel', KEYS[1], all[field]) end
    if expiry and expiry <= now then
        expired[#expired + 1] = all[field]
        expired[#expired + 1] = holder
    end
end
return expired
"""
#: Acquires or renews the leadership of dispatchers, unless another holder has it: leader; holder, duration in ms.
LEAD = """
local holder, left = redis.call('get', KEYS[1]), redis.call('pttl', KEYS[1])
if holder and holder ~= ARGV[1] and left >= 0 and left <= 10 * ARGV[2] then return 0 end
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
return 1
"""
#: Releases the leadership: leader; holder.
STEP_DOWN = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('del', KEYS[1])
"""
#: Registers a worker, and forgets those that did not register for a while: workers; worker, duration in ms.
REGISTER = f"""{_NOW}
redis.call('zremrangebyscore', KEYS[1], '-inf', now - ARGV[2])
redis.call('zremrangebyscore', KEYS[1], now + ARGV[2], '+inf')
return redis.call('zadd', KEYS[1], now, ARGV[1])
"""


#: The scripts with arguments, with which `memtail doctor` runs each of them once. Each leaves nothing for the next, of another type of key.
TRIAL_RUN = (
    (ACQUIRE, ("probe", "doctor", 1000)),
    (RENEW, ("probe", "doctor", 1000)),
    (EXPIRED, (1000,)),
    (RELEASE, ("probe", "doctor")),
    (LEAD, ("doctor", 1000)),
    (STEP_DOWN, ("doctor",)),
    (REGISTER, ("doctor", 1000)),
)


def key_prefix(address: str, identity: bytes) -> str:
    """Return the prefix of the keys of a store's services, so that those of several stores may share one Redis.

    Args:
        address: of the store, without its server, which may have several names.
        identity: of the store (`memtail.storage.identity`). A copy under another address has it too, hence the address.
    """
    return f"{_PREFIX}{hashlib.sha256(address.encode() + b' ' + identity).hexdigest()[:8]}:"
