// A CUDA driver of two GPUs, as far as dist_int8/devices.py asks one: what the real library answers
// through the same C interface, so that the code that talks to cuda-python runs without a GPU.
#include <stdlib.h>
#include <string.h>

typedef int Status;

static Status cuInit(unsigned flags) {
  const char* refusal = getenv("DRIVER_REFUSES");
  return refusal ? atoi(refusal) : 0;
}

static Status cuDriverGetVersion(int* version) { return *version = 13000, 0; }

static Status cuDeviceGetCount(int* count) {
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  return *count = visible && !*visible ? 0 : 2, 0;
}

static Status cuDeviceGet(int* device, int index) { return *device = index, 0; }

static Status cuDeviceGetName(char* name, int length, int device) {
  strncpy(name, device ? "Second GPU" : "First GPU", length);
  return 0;
}

static Status cuDeviceTotalMem(size_t* bytes, int device) {
  return *bytes = (size_t)(80 - device) << 30, 0;
}

static Status cuDeviceGetAttribute(int* value, int attribute, int device) {
  // 75 and 76: major and minor compute capability.
  return *value = attribute == 75 ? 8 + device : 0, 0;
}

static Status cuDeviceCanAccessPeer(int* can, int device, int peer) {
  return *can = device == 0 && peer == 1, 0;
}

static Status cuDeviceGetUuid(char* uuid, int device) { return memset(uuid, device, 16), 0; }

// The bindings ask for every other function too and keep what they get for later.
Status cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long flags,
                           int* found) {
  struct {
    const char* name;
    void* function;
  } functions[] = {
      {"cuInit", cuInit},
      {"cuDriverGetVersion", cuDriverGetVersion},
      {"cuDeviceGetCount", cuDeviceGetCount},
      {"cuDeviceGet", cuDeviceGet},
      {"cuDeviceGetName", cuDeviceGetName},
      {"cuDeviceTotalMem", cuDeviceTotalMem},
      {"cuDeviceGetAttribute", cuDeviceGetAttribute},
      {"cuDeviceCanAccessPeer", cuDeviceCanAccessPeer},
      {"cuDeviceGetUuid", cuDeviceGetUuid},
  };
  *function = NULL;
  for (size_t i = 0; i < sizeof functions / sizeof *functions; ++i)
    if (!strcmp(name, functions[i].name)) *function = functions[i].function;
  if (found) *found = *function ? 0 : 1;
  return *function ? 0 : 500;
}

Status cuGetProcAddress(const char* name, void** function, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
